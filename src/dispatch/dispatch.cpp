// Dispatch: writes each row straight into the inboxes of the ranks that need it.
#include <expar/dispatch.h>

#include <cstring>
#include <string>

#include "src/dispatch/bounded.h"
#include "src/dispatch/cargo.h"
#include "src/dispatch/lists.h"
#include "src/dispatch/plan_data.h"
#include "src/dispatch/row_order.h"
#include "src/util/check.h"
#include "src/util/copy.h"
#include "src/util/kept.h"
#include "src/util/shown.h"
#include "src/util/store_choice.h"

namespace expar {
namespace {

void validate(ConstTensor x, ConstTensor weights, const Plan& plan, const DispatchOptions& options) {
  if (options.failure) throw *options.failure;
  if (plan.data().failure) throw *plan.data().failure;
  require_rows("x", x);
  if (x.shape().rank() != 2) refuse("x has shape " + x.shape().str() + ", not [T, H]");
  if (x.size(0) != plan.tokens())
    refuse("x has " + std::to_string(x.size(0)) + " tokens, the plan " + std::to_string(plan.tokens()));
  if (!weights.absent()) require("weights", weights, DType::f32, {plan.tokens(), plan.topk()});
  if (options.lists_of != nullptr && options.lists_of->plan().id() != plan.id())
    refuse("lists_of is the inbox of another plan");
  const DType payload = options.payload.value_or(x.dtype());
  const bool narrow = payload == DType::bf16 || payload == DType::f16 || payload == DType::int8 ||
                      payload == DType::fp8_e4m3 || payload == x.dtype();
  if (!narrow) {
    refuse("rows of " + std::string(name(x.dtype())) + " do not travel as " + std::string(name(payload)) +
           ", but as bf16, f16, int8 or fp8_e4m3");
  }
  if (options.capacity < 0) refuse("capacity is " + std::to_string(options.capacity) + ", below 0");
  if (plan.replicated() && options.layout == Layout::rank_major)
    refuse("rows of a replicated plan come from no rank: choose another layout than rank_major");
  if (!plan.open()) check_capacity(plan, options.layout, options.capacity);
}

Signature signature_of(ConstTensor x, const Plan& plan, const DispatchOptions& options) {
  Signature signature("dispatch");
  signature.with("hidden", x.shape().rank() == 2 ? x.size(1) : 0).with("dtype", static_cast<std::int64_t>(x.dtype()));
  signature.with("lists", options.lists_of == nullptr);
  signature.with("layout", static_cast<std::int64_t>(options.layout)).with("capacity", options.capacity);
  signature.with("payload", static_cast<std::int64_t>(options.payload.value_or(x.dtype())));
  signature.with("plan", plan ? static_cast<std::int64_t>(plan.id()) : 0);
  if (plan && plan.open()) {
    signature.with("bound", plan.bound()).with("topk", plan.topk()).with("experts", plan.experts());
    signature.with("alignment", plan.data().alignment).with_list("first_experts", plan.data().first_experts);
  }
  return signature;
}

}  // namespace

struct Inbox::Data {
  Plan plan;
  Block block;  // rows [U, H], then the tags they came with
  Block packed_block;
  Block rounded_block;  // where rows travel as a payload: [U, H] as they were, then this rank's own [T, H]
  ConstTensor x, rows, packed;
  std::shared_ptr<Lists> lists;
  Layout layout = Layout::indexed;
  std::optional<RowOrder> order;
};

Inbox::Inbox() = default;
Inbox::Inbox(std::shared_ptr<Data> data) : data_(std::move(data)) {}
Inbox::~Inbox() = default;
Inbox::Inbox(Inbox&&) noexcept = default;
Inbox& Inbox::operator=(Inbox&&) noexcept = default;
const Plan& Inbox::plan() const { return data_->plan; }
ConstTensor Inbox::rows() const { return data_->rows; }
std::span<const RowRef> Inbox::refs() const { return data_->lists->refs(); }
Layout Inbox::layout() const { return data_->layout; }
ConstTensor Inbox::packed() const { return data_->packed; }
std::span<const std::int64_t> Inbox::offsets() const { return data_->order->offsets(); }
Rows Inbox::gathered() const {
  return {.base = {data_->x.data(), data_->rows.data()},
          .dtype = data_->rows.dtype(),
          .width = data_->rows.size(1),
          .refs = refs().data()};
}

/// A dispatch that has been started: what this rank owes the others, and where their rows arrive.
struct PendingDispatch::State final : InFlight {
  State(const Context& c, ConstTensor x_, ConstTensor weights_, const Plan& p, const DispatchOptions& o)
      : context(c),
        communicator(c.communicator()),
        plan(p),
        options(o),
        x(x_),
        weights(weights_.absent() || o.failure ? nullptr : weights_.as<float>()),
        width(x_.shape().rank() == 2 ? x_.size(1) : 0),
        cargo(c, x_, o.payload),
        row_bytes(cargo.row_bytes()),
        tag_bytes(o.lists_of == nullptr && p ? at(p.topk()) * sizeof(SlotTag) : 0),
        operation(communicator, signature_of(x_, p, o)) {}

  std::size_t tags_offset() const { return (room * row_bytes + 63) / 64 * 64; }

  void start(ConstTensor weights_) {
    operation.ready([&] {
      validate(x, weights_, plan, options);
      inbox = make_kept<Inbox::Data>(context.memory());
      room = at(plan.open() ? (communicator.size() - 1) * plan.bound() : plan.unique());
      inbox->block = communicator.arena().allocate(tags_offset() + room * tag_bytes);
      if (cargo.rounded()) {
        inbox->rounded_block = communicator.arena().allocate((room + at(x.size(0))) * cargo.full_bytes());
      }
      if (!plan.open()) return operation.show(inbox->block, tags_offset());
      shelf.emplace(context, operation, plan, row_bytes);
      const Operation::Words words = shelf->show(weights);
      cargo.load(shelf->rows(), x);
      return words;
    });
    operation.keep_advancing(this);
  }

  void advance() override {
    if (!sent && operation.agreed()) send();
  }

  /// Gives every rank its rows. The nearest rank above comes first, so that ranks do not all write to the same one.
  void send() {
    sent = true;
    if (shelf) return shelf->read();
    if (plan.replicated()) return;  // the others have the rows
    std::size_t staged = 0;
    for (int step = 1; step < communicator.size(); ++step) {
      const int peer = (communicator.rank() + step) % communicator.size();
      if (!communicator.transport().mapped(peer)) staged += plan.sends(peer).size() * row_bytes;
    }
    staging.resize(staged);
    staged = 0;
    for (int step = 1; step < communicator.size(); ++step) {
      const int peer = (communicator.rank() + step) % communicator.size();
      if (communicator.transport().mapped(peer)) {
        write_to(peer);
      } else {
        staged += post(peer, staging.data() + staged);
      }
    }
    operation.done();
    transfers.start(operation);
  }

  void write_to(int peer) {
    const auto tokens = plan.sends(peer);
    if (tokens.empty()) return;
    const auto block = shown_block(operation, peer);
    const std::size_t first = at(plan.send_row(peer));
    const std::size_t tags_begin = first_word(operation.words(peer));
    const std::size_t end = first + tokens.size();
    if (end * row_bytes > tags_begin || tags_begin > block.size() || end * tag_bytes > block.size() - tags_begin) {
      communicator.blame(peer, "dispatch",
                         "showed an inbox of " + std::to_string(block.size()) + " bytes, too small for its plan");
    }
    std::byte* const to = block.data() + first * row_bytes;
    if (cargo.rounded()) {
      cargo.load(to, x, tokens, Store::cached);
    } else {
      context.stores().run(tokens.size() * row_bytes, [&](Store store) { cargo.load(to, x, tokens, store); });
    }
    if (tag_bytes == 0) return;
    write_tags(plan, peer, tokens, weights, reinterpret_cast<SlotTag*>(block.data() + tags_begin + first * tag_bytes));
  }

  /// Collects the transfers to and from a rank that is not mapped; returns the bytes used of `stage`.
  std::size_t post(int peer, std::byte* stage) {
    const auto tokens = plan.sends(peer);
    cargo.load(stage, x, tokens, Store::cached);
    transfers.send(peer, stage, tokens.size() * row_bytes);
    if (tag_bytes > 0) {
      auto& tags = staged_tags.emplace_back(tokens.size() * at(plan.topk()));
      write_tags(plan, peer, tokens, weights, tags.data());
      transfers.send(peer, reinterpret_cast<const std::byte*>(tags.data()), tokens.size() * tag_bytes);
    }
    const std::size_t first = at(plan.sources()[at(peer)]);
    const std::size_t count = at(plan.sources()[at(peer + 1)]) - first;
    transfers.receive(peer, inbox->block.data() + first * row_bytes, count * row_bytes);
    transfers.receive(peer, inbox->block.data() + tags_offset() + first * tag_bytes, count * tag_bytes);
    return tokens.size() * row_bytes;
  }

  void await_rows() {
    for (int peer = 0; peer < communicator.size(); ++peer) {
      const bool expected = plan.sources()[at(peer + 1)] > plan.sources()[at(peer)];
      if (expected && communicator.transport().mapped(peer)) operation.await_done(peer, "its rows");
    }
    transfers.finish(operation, "its rows");
  }

  /// The rows of a bounded plan that this rank needs, from where the others showed them.
  void take_rows() {
    for (int peer = 0; peer < communicator.size(); ++peer) {
      if (peer == communicator.rank()) continue;
      const std::size_t first = at(plan.sources()[at(peer)]), count = at(plan.sources()[at(peer + 1)]) - first;
      auto* tags = reinterpret_cast<SlotTag*>(inbox->block.data() + tags_offset() + first * tag_bytes);
      const auto tokens = shelf->take(peer, count, tags);
      copy_rows(inbox->block.data() + first * row_bytes, shelf->rows_of(peer), tokens, row_bytes, Store::cached);
    }
  }

  /// The rows of others and this rank's own as the experts take them.
  void unpack() {
    inbox->rows = ConstTensor(inbox->block.data(), x.dtype(), Shape{plan.unique(), width});
    inbox->x = x;
    if (!cargo.rounded()) return;
    std::byte* const own = inbox->rounded_block.data() + room * cargo.full_bytes();
    cargo.unload(inbox->rounded_block.data(), inbox->block.data(), plan.unique());
    shelf ? cargo.unload(own, shelf->rows(), x.size(0)) : cargo.round(own, x);  // on a shelf they are rounded already
    inbox->rows = ConstTensor(inbox->rounded_block.data(), x.dtype(), Shape{plan.unique(), width});
    inbox->x = ConstTensor(own, x.dtype(), x.shape());
  }

  /// Adds the rows of the other ranks to the lists.
  void list_rows() {
    const auto* tags = reinterpret_cast<const SlotTag*>(inbox->block.data() + tags_offset());
    for (int peer = 0; peer < communicator.size(); ++peer) {
      const std::int64_t row = plan.sources()[at(peer)];
      if (peer == communicator.rank() || inbox->lists->add(plan, peer, tags + row * plan.topk())) continue;
      communicator.blame(peer, "dispatch", "sent other experts than its plan says");
    }
  }

  /// Only now are the counts known: to every rank, which finds the same.
  void check_capacity_of_all() {
    try {
      check_capacity(plan, options.layout, options.capacity);
    } catch (const Error& error) {
      communicator.throw_alike(Error(error.code(), error.message(), {.rank = 0, .operation = "dispatch"}));
    }
  }

  /// A copy of all rows in the order of the layout, rows of padding zero.
  void pack() {
    inbox->layout = options.layout;
    const std::size_t bytes = cargo.full_bytes();
    const RowOrder& order = inbox->order.emplace(plan, communicator.rank(), options.layout, options.capacity);
    if (options.layout == Layout::indexed) return;
    inbox->packed_block = communicator.arena().allocate(at(order.rows()) * bytes);
    inbox->packed = ConstTensor(inbox->packed_block.data(), x.dtype(), order.shape(width));
    const std::int64_t experts = plan.local().count;
    if (options.layout == Layout::rank_major) {
      for (int s = 0; s < communicator.size(); ++s) {
        for (std::int64_t e = 0; e < experts; ++e) {
          const std::int64_t first = order.source_start(s, e);
          pack(plan.source_start(s, e), order.offsets()[at(s * experts + e + 1)] - first, first);
        }
      }
      return;
    }
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::int64_t first = order.offsets()[at(e)], rows = plan.rows()[at(e)];
      pack(plan.offsets()[at(e)], rows, first);
      const std::int64_t padding = order.offsets()[at(e + 1)] - first - rows;
      std::memset(inbox->packed_block.data() + at(first + rows) * bytes, 0, at(padding) * bytes);
    }
  }

  /// `count` rows of the list, from `first` on, go to the packed rows from `to` on.
  void pack(std::int64_t first, std::int64_t count, std::int64_t to) {
    const Rows from{.base = {inbox->x.data(), inbox->rows.data()},
                    .dtype = x.dtype(),
                    .width = width,
                    .refs = inbox->lists->refs().data() + first};
    context.kernels().gather(
        {.rows = from, .count = count, .out = inbox->packed_block.data() + at(to) * cargo.full_bytes()},
        context.pool());
  }

  Context context;
  Communicator communicator;
  Plan plan;
  DispatchOptions options;
  ConstTensor x;
  const float* weights;
  std::int64_t width;
  Cargo cargo;
  std::size_t row_bytes, tag_bytes;  // on the way
  std::shared_ptr<Inbox::Data> inbox;
  std::size_t room = 0;        // of the inbox, in rows
  std::optional<Shelf> shelf;  // where the plan was open
  std::vector<std::byte> staging;
  std::vector<std::vector<SlotTag>> staged_tags;
  Transfers transfers;
  bool sent = false;
  Operation operation;  // last: it leaves the communicator's list before anything it uses goes
};

PendingDispatch::PendingDispatch(std::shared_ptr<State> state) : state_(std::move(state)) {}
PendingDispatch::PendingDispatch(PendingDispatch&&) noexcept = default;
PendingDispatch::~PendingDispatch() = default;

PendingDispatch start_dispatch(const Context& context, ConstTensor x, ConstTensor weights, const Plan& plan,
                               const DispatchOptions& options) {
  const Phase phase(context.trace(), operation_span("start dispatch"));
  auto state = make_kept<PendingDispatch::State>(context.memory(), context, x, weights, plan, options);
  state->start(weights);
  return PendingDispatch(std::move(state));
}

Inbox PendingDispatch::finish() {
  const std::shared_ptr<State> state = std::move(state_);
  const Phase phase(state->communicator.trace(), operation_span("finish dispatch"));
  state->operation.meet();
  if (!state->sent) state->send();
  if (state->shelf) state->plan = state->shelf->complete();
  state->inbox->plan = state->plan;
  const Inbox* like = state->options.lists_of;
  state->inbox->lists = like != nullptr
                            ? like->data_->lists
                            : make_kept<Lists>(state->context.memory(), state->context, state->plan, state->weights);
  state->shelf ? state->take_rows() : state->await_rows();
  state->operation.complete();
  state->unpack();
  if (like == nullptr && !state->plan.replicated()) state->list_rows();
  if (state->shelf) state->check_capacity_of_all();
  state->pack();
  return Inbox(std::move(state->inbox));
}

Inbox dispatch(const Context& context, ConstTensor x, ConstTensor weights, const Plan& plan,
               const DispatchOptions& options) {
  return start_dispatch(context, x, weights, plan, options).finish();
}

}  // namespace expar
