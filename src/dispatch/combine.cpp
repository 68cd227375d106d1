// Combine: each source reads its results where the experts wrote them and sums them in slot order.
#include <cstring>
#include <string>
#include <utility>

#include <expar/collectives.h>
#include <expar/dispatch.h>

#include "src/dispatch/plan_data.h"
#include "src/dispatch/results.h"
#include "src/dispatch/row_order.h"
#include "src/dispatch/sum_parts.h"
#include "src/util/check.h"
#include "src/util/kept.h"
#include "src/util/shown.h"

namespace expar {
namespace {

std::int64_t capacity_of(const Outbox& outbox) {
  return outbox.layout() == Layout::padded && outbox.rows().shape().rank() == 3 ? outbox.rows().size(1) : 0;
}

/// Elements of one row.
std::int64_t width_of(const Outbox& outbox) {
  const int axes = outbox.rows().shape().rank();
  return axes == 0 ? 0 : outbox.rows().size(axes - 1);
}

/// What every outbox of an operation has in common.
Signature& with_layout(Signature& signature, const Outbox& outbox) {
  const Layout layout = outbox.layout() == Layout::expert_major ? Layout::indexed : outbox.layout();  // the same order
  return signature.with("layout", static_cast<std::int64_t>(layout)).with("capacity", capacity_of(outbox));
}

Operation::Words show_outbox(Outbox& outbox, const RowOrder& order, const Operation& operation) {
  const Shape wanted = order.shape(width_of(outbox));
  if (outbox.rows().shape() != wanted)
    refuse("the outbox is " + outbox.rows().shape().str() + ", the plan's results are " + wanted.str());
  return operation.show(outbox.block());
}

Outbox make_outbox(const Context& context, const Shape& shape, DType dtype, Layout layout) {
  Block block = context.communicator().allocate(at(shape.elements()) * size_of(dtype));
  const Tensor rows(block.data(), dtype, shape);
  return Outbox(std::move(block), rows, layout);
}

/// The part of each result that each rank reads; all of it, or its columns.
RowParts parts_of(const Context& context, std::int64_t width, DType dtype, bool slice) {
  RowParts parts{at(width) * size_of(dtype), std::pmr::vector<ByteRange>(at(context.size()), context.memory().get())};
  for (int rank = 0; rank < context.size(); ++rank) {
    const Part part = slice ? part_of(width, rank, context.size()) : Part{0, width};
    parts.of[at(rank)] = {at(part.begin) * size_of(dtype), at(part.end - part.begin) * size_of(dtype)};
  }
  return parts;
}

void check_width(std::int64_t width) {
  if (width < 0) refuse("an outbox of width " + std::to_string(width));
}

}  // namespace

Outbox make_outbox(const Context& context, const Plan& plan, std::int64_t width, DType dtype) {
  check_width(width);
  return make_outbox(context, Shape{plan.received(), width}, dtype, Layout::indexed);
}

Outbox make_outbox(const Context& context, const Inbox& inbox, std::int64_t width, DType dtype) {
  check_width(width);
  const Shape packed = inbox.packed().shape();
  const Shape shape = packed.rank() == 3 ? Shape{packed[0], packed[1], width} : Shape{inbox.offsets().back(), width};
  return make_outbox(context, shape, dtype, inbox.layout());
}

struct PendingCombine::State final : InFlight {
  State(const Context& c, const Plan& p, Outbox& y_, Tensor out_, const CombineOptions& options_,
        const Signature& signature)
      : context(c),
        plan(p),
        y(y_),
        out(out_),
        options(options_),
        order(p, c.rank(), y_.layout(), capacity_of(y_)),
        operation(c.communicator(), signature) {}

  void advance() override {
    if (!results && operation.agreed()) read();
  }
  void read() {
    results.emplace(operation, plan, order, y, parts_of(context, width_of(y), out.dtype(), options.slice));
  }
  bool in_parts() const { return options.sum_over && options.sum_over.size() > 1; }
  /// Waits for the results and sums them into `to`, with what `add` adds.
  void sum(Tensor to, const CombineOptions& add, const NormOutput& norm_of_sum);

  Context context;
  Plan plan;
  Outbox& y;
  const float* weights = nullptr;
  Tensor out;
  CombineOptions options;
  NormOutput norm;
  RowOrder order;
  std::optional<Results> results;
  Operation operation;  // last: it leaves the communicator's list before anything it uses goes
};

PendingCombine::PendingCombine(std::shared_ptr<State> state) : state_(std::move(state)) {}
PendingCombine::PendingCombine(PendingCombine&&) noexcept = default;
PendingCombine::~PendingCombine() = default;

PendingCombine start_combine(const Context& context, const Plan& plan, Outbox& y, std::optional<ConstTensor> weights,
                             Tensor out, const CombineOptions& options) {
  const Phase phase(context.trace(), operation_span("start combine"));
  const std::int64_t width = width_of(y);
  const DType dtype = y.rows().dtype();
  Signature signature("combine");
  signature.with("hidden", width).with("dtype", static_cast<std::int64_t>(dtype));
  signature.with("plan", static_cast<std::int64_t>(plan.id())).with("weighted", weights.has_value());
  signature.with("slice", options.slice).with("parts", options.sum_over ? options.sum_over.size() : 1);
  with_layout(signature, y);
  auto state = make_kept<PendingCombine::State>(context.memory(), context, plan, y, out, options, signature);
  state->operation.ready([&] {
    require_rows("y", y.rows());
    if (options.slice && !plan.data().replicated) refuse("slices are of a replicated plan");
    if (options.slice && !options.norm.y.absent()) refuse("a slice has no norm: it takes whole rows");
    if (options.slice && state->in_parts()) refuse("a slice of results cannot be summed over slices of experts");
    const Part columns = options.slice ? part_of(width, context.rank(), context.size()) : Part{0, width};
    require("out", out, dtype, Shape{plan.tokens(), columns.end - columns.begin});
    if (weights) require("weights", *weights, DType::f32, Shape{plan.tokens(), plan.topk()});
    if (!options.shared.absent()) require("shared", options.shared, DType::f32, out.shape());
    if (!options.shared_weights.absent()) {
      require("shared_weights", options.shared_weights, DType::f32, Shape{plan.tokens()});
    }
    if (!options.residual.absent()) require("residual", options.residual, dtype, out.shape());
    state->norm = checked(options.norm, dtype, out.shape());
    if (weights) state->weights = weights->as<float>();
    return show_outbox(y, state->order, state->operation);
  });
  state->operation.keep_advancing(state.get());
  return PendingCombine(std::move(state));
}

void PendingCombine::State::sum(Tensor to, const CombineOptions& add, const NormOutput& norm_of_sum) {
  operation.meet();
  if (!results) read();
  const void* const* slots = results->finish();
  context.kernels().reduce({.tokens = plan.tokens(),
                            .topk = plan.topk(),
                            .width = to.size(1),
                            .dtype = to.dtype(),
                            .slots = slots,
                            .weights = weights,
                            .shared = static_cast<const float*>(add.shared.data()),
                            .shared_weights = static_cast<const float*>(add.shared_weights.data()),
                            .residual = add.residual.data(),
                            .out = to.data(),
                            .norm = norm_of_sum},
                           context.pool());
  operation.complete();
}

void PendingCombine::finish() {
  const std::shared_ptr<State> state = std::move(state_);
  const Phase phase(state->context.trace(), operation_span("finish combine"));
  if (!state->in_parts()) return state->sum(state->out, state->options, state->norm);
  sum_parts(state->context.on(state->options.sum_over), state->plan, width_of(state->y), state->y.rows().dtype(),
            state->out, state->options, [&](Tensor part) { state->sum(part, {}, {}); });
}

void combine(const Context& context, const Plan& plan, Outbox& y, std::optional<ConstTensor> weights, Tensor out,
             const CombineOptions& options) {
  start_combine(context, plan, y, weights, out, options).finish();
}

void fetch_slots(const Context& context, const Plan& plan, Outbox& values, Tensor out) {
  const Phase phase(context.trace(), operation_span("fetch_slots"));
  const std::int64_t width = width_of(values);
  Signature signature("fetch_slots");
  signature.with("width", width).with("plan", static_cast<std::int64_t>(plan.id()));
  Operation operation(context.communicator(), with_layout(signature, values));
  const RowOrder order(plan, context.rank(), values.layout(), capacity_of(values));
  operation.ready([&] {
    require("values", values.rows(), DType::f32, values.rows().shape());
    require("out", out, DType::f32, Shape{plan.tokens(), plan.topk(), width});
    return show_outbox(values, order, operation);
  });
  operation.meet();
  const std::size_t row_bytes = at(width) * sizeof(float);
  Results results(operation, plan, order, values, parts_of(context, width, DType::f32, false));
  const void* const* slots = results.finish();
  std::byte* to = out.bytes();
  for (std::int64_t i = 0; i < plan.tokens() * plan.topk(); ++i, to += row_bytes) {
    if (const void* row = slots[i]) {
      std::memcpy(to, row, row_bytes);
    } else {
      std::memset(to, 0, row_bytes);
    }
  }
  operation.complete();
}

}  // namespace expar
