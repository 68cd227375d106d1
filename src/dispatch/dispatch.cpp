// Dispatch: starts a way for the rows to travel, and makes an inbox of what came.
#include <expar/dispatch.h>

#include <string>

#include "src/dispatch/bounded.h"
#include "src/dispatch/exact.h"
#include "src/dispatch/plan_data.h"
#include "src/util/kept.h"

namespace expar {
namespace {

void validate(ConstTensor x, ConstTensor weights, const Plan& plan, const DispatchOptions& options) {
  if (plan.data().failure) throw *plan.data().failure;
  require_rows("x", x);
  if (x.shape().rank() != 2) refuse("x has shape " + x.shape().str() + ", not [T, H]");
  if (x.size(0) != plan.tokens())
    refuse("x has " + std::to_string(x.size(0)) + " tokens, the plan " + std::to_string(plan.tokens()));
  if (!weights.absent()) require("weights", weights, DType::f32, {plan.tokens(), plan.topk()});
  if (options.lists_of != nullptr && options.lists_of->plan().id() != plan.id())
    refuse("lists_of is the inbox of another plan");
  const DType payload = options.payload.value_or(x.dtype());
  if (payload != x.dtype() && find_payload(payload) == nullptr) {
    std::string known;
    for (const Payload& one : kPayloads) known += (known.empty() ? "" : ", ") + std::string(name(one.dtype));
    refuse("rows of " + std::string(name(x.dtype())) + " do not travel as " + std::string(name(payload)) +
           ", but as one of " + known);
  }
  if (options.capacity < 0) refuse("capacity is " + std::to_string(options.capacity) + ", below 0");
  if (plan.data().replicated && options.layout == Layout::rank_major)
    refuse("rows of a replicated plan come from no rank: choose another layout than rank_major");
  if (!plan.open()) check_capacity(plan, options.layout, options.capacity);
}

Signature signature_of(ConstTensor x, const Plan& plan, const DispatchOptions& options) {
  Signature signature("dispatch");
  signature.with("hidden", x.shape().rank() == 2 ? x.size(1) : 0).with("dtype", static_cast<std::int64_t>(x.dtype()));
  signature.with("lists", options.lists_of == nullptr);
  signature.with("layout", static_cast<std::int64_t>(options.layout)).with("capacity", options.capacity);
  signature.with("payload", static_cast<std::int64_t>(options.payload.value_or(x.dtype())));
  for (const NamedNumber& number : options.alike) signature.with(number.name, number.value);
  signature.with("plan", plan ? static_cast<std::int64_t>(plan.id()) : 0);
  if (plan && plan.open()) {
    signature.with("bound", plan.data().bound).with("topk", plan.topk()).with("experts", plan.experts());
    signature.with("alignment", plan.data().alignment).with_list("first_experts", plan.data().first_experts);
  }
  return signature;
}

}  // namespace

/// A dispatch that has been started. Its phases, in order:
///   exact       ready shows the inbox; agreed: rows and tags go into those of others; finish awaits theirs
///   bounded     ready shows counts, tags and rows; finish completes the plan with them and takes what is needed
///   replicated  ready alone: nobody's rows travel
/// Then all: the operation is complete; payloads are read; the lists get the rows of others; a layout packs its copy.
struct PendingDispatch::State final : InFlight {
  State(const Context& c, ConstTensor x_, const Plan& p, const DispatchOptions& o)
      : context(c),
        plan(p),
        options(o),
        x(x_),
        payload(c, x_, o.payload),
        operation(c.communicator(), signature_of(x_, p, o)) {}

  void start(ConstTensor weights_) {
    operation.ready([&] {
      validate(x, weights_, plan, options);
      if (!weights_.absent()) weights = weights_.as<float>();
      inbox = make_kept<Inbox::Data>(context.memory());
      const std::size_t tag_bytes = options.lists_of == nullptr ? at(plan.topk()) * sizeof(SlotTag) : 0;
      const Shipment shipment{context, operation, plan, x, weights, payload, tag_bytes, inbox->room};
      if (plan.data().replicated) {
        carrier = make_kept<Carrier>(context.memory(), shipment);
      } else if (plan.open()) {
        carrier = make_kept<BoundedRows>(context.memory(), shipment);
      } else {
        carrier = make_kept<ExactRows>(context.memory(), shipment);
      }
      return carrier->show();
    });
    operation.keep_advancing(this);
  }

  void advance() override {
    if (!sent && operation.agreed()) send();
  }
  void send() {
    sent = true;
    carrier->send();
  }

  /// The rows of others and this rank's own as the experts take them.
  void read_rows() {
    const Shape shape{plan.unique(), x.size(1)};
    inbox->rows = ConstTensor(inbox->room.row(0), x.dtype(), shape);
    inbox->x = x;
    if (!payload) return;
    inbox->read_block = context.communicator().allocate(at(plan.unique() + x.size(0)) * payload.full_bytes());
    std::byte* const read = inbox->read_block.data();
    std::byte* const own = read + at(plan.unique()) * payload.full_bytes();
    payload.read(read, inbox->room.row(0), plan.unique());
    carrier->round_own(own);
    inbox->rows = ConstTensor(read, x.dtype(), shape);
    inbox->x = ConstTensor(own, x.dtype(), x.shape());
  }

  /// Adds the rows of the other ranks to the lists.
  void list_rows() {
    for (int peer = 0; peer < context.size(); ++peer) {
      if (peer == context.rank()) continue;
      if (inbox->lists->add(plan, peer, inbox->room.tags(plan.sources()[at(peer)]))) continue;
      context.communicator().blame(peer, operation.name(), "sent other experts than its plan says");
    }
  }

  Context context;
  Plan plan;
  DispatchOptions options;
  ConstTensor x;
  const float* weights = nullptr;
  RowPayload payload;
  std::shared_ptr<Inbox::Data> inbox;
  std::shared_ptr<Carrier> carrier;
  bool sent = false;
  Operation operation;  // last: it leaves the communicator's list before anything it uses goes
};

PendingDispatch::PendingDispatch(std::shared_ptr<State> state) : state_(std::move(state)) {}
PendingDispatch::PendingDispatch(PendingDispatch&&) noexcept = default;
PendingDispatch::~PendingDispatch() = default;

PendingDispatch start_dispatch(const Context& context, ConstTensor x, ConstTensor weights, const Plan& plan,
                               const DispatchOptions& options) {
  const Phase phase(context.trace(), operation_span("start dispatch"));
  auto state = make_kept<PendingDispatch::State>(context.memory(), context, x, plan, options);
  state->start(weights);
  state->advance();  // whoever comes last finds all others ready
  return PendingDispatch(std::move(state));
}

Inbox PendingDispatch::finish() {
  const std::shared_ptr<State> state = std::move(state_);
  const Context& context = state->context;
  const Phase phase(context.trace(), operation_span("finish dispatch"));
  state->operation.meet();
  if (!state->sent) state->send();
  const Plan& plan = state->plan = state->carrier->complete();
  Inbox::Data& inbox = *state->inbox;
  inbox.plan = plan;
  const DispatchOptions& options = state->options;
  const Inbox* like = options.lists_of;
  inbox.lists =
      like != nullptr ? like->data_->lists : make_kept<Lists>(context.memory(), context, plan, state->weights);
  state->carrier->receive();
  state->operation.complete();
  state->read_rows();
  if (like == nullptr && !plan.data().replicated) state->list_rows();
  try {  // of a bounded plan the counts are known only now: to every rank, which finds the same
    check_capacity(plan, options.layout, options.capacity);
  } catch (const Error& error) {
    context.communicator().throw_alike(Error(error.code(), error.message(), {.rank = 0, .operation = "dispatch"}));
  }
  inbox.pack(context, options.layout, options.capacity);
  return Inbox(std::move(state->inbox));
}

Inbox dispatch(const Context& context, ConstTensor x, ConstTensor weights, const Plan& plan,
               const DispatchOptions& options) {
  return start_dispatch(context, x, weights, plan, options).finish();
}

}  // namespace expar
