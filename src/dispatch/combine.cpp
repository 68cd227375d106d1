// Combine: each source reads its results where the experts wrote them and sums them in slot order.
#include <cstring>
#include <string>

#include <expar/dispatch.h>

#include "src/dispatch/results.h"
#include "src/util/shown.h"

namespace expar {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::bad_argument, message); }

std::string describe(const ConstTensor& tensor) {
  return std::string(name(tensor.dtype())) + " " + tensor.shape().str();
}

void require(const char* what, const ConstTensor& tensor, DType dtype, const Shape& shape) {
  if (tensor.dtype() == dtype && tensor.shape() == shape) return;
  refuse(std::string(what) + " is " + describe(tensor) + ", not " + std::string(name(dtype)) + " " + shape.str());
}

Operation::Words show_outbox(Outbox& outbox, const Plan& plan, const Operation& operation) {
  if (outbox.rows().shape().rank() != 2 || outbox.rows().size(0) != plan.received()) {
    refuse("the outbox holds " + outbox.rows().shape().str() + ", the plan has " + std::to_string(plan.received()) +
           " rows");
  }
  outbox.block().used_by(operation.sequence());
  return show(outbox.block());
}

}  // namespace

Outbox make_outbox(const Context& context, const Plan& plan, std::int64_t width, DType dtype) {
  if (width < 0) refuse("an outbox of width " + std::to_string(width));
  const Shape shape{plan.received(), width};
  Block block = context.communicator().arena().allocate(at(shape.elements()) * size_of(dtype));
  const Tensor rows(block.data(), dtype, shape);
  return Outbox(std::move(block), rows);
}

struct PendingCombine::State final : InFlight {
  State(const Context& c, const Plan& p, Outbox& y_, Tensor out_, ConstTensor residual_, const Signature& signature)
      : context(c),
        plan(p),
        y(y_),
        out(out_),
        residual(residual_),
        operation(c.communicator(), signature, c.timeout()) {}

  void advance() override {
    if (!results && operation.agreed()) read();
  }
  void read() {
    const std::size_t row_bytes = at(out.size(1)) * size_of(out.dtype());
    results.emplace(context, operation, plan, y, row_bytes);
  }

  Context context;
  Plan plan;
  Outbox& y;
  const float* weights = nullptr;
  Tensor out;
  ConstTensor residual;
  std::optional<Results> results;
  Operation operation;  // last: it leaves the communicator's list before anything it uses goes
};

PendingCombine::PendingCombine(std::unique_ptr<State> state) : state_(std::move(state)) {}
PendingCombine::PendingCombine(PendingCombine&&) noexcept = default;
PendingCombine::~PendingCombine() = default;

PendingCombine start_combine(const Context& context, const Plan& plan, Outbox& y, std::optional<ConstTensor> weights,
                             Tensor out, const CombineOptions& options) {
  const Phase phase(context.trace(), operation_span("start combine"));
  const std::int64_t width = y.rows().shape().rank() == 2 ? y.rows().size(1) : 0;
  const DType dtype = y.rows().dtype();
  const Signature signature = Signature("combine")
                                  .with("hidden", width)
                                  .with("dtype", static_cast<std::int64_t>(dtype))
                                  .with("plan", static_cast<std::int64_t>(plan.id()))
                                  .with("weighted", weights.has_value());
  auto state = std::make_unique<PendingCombine::State>(context, plan, y, out, options.residual, signature);
  state->operation.ready([&] {
    if (dtype != DType::f32 && dtype != DType::bf16)
      refuse("y is " + std::string(name(dtype)) + ", neither f32 nor bf16");
    require("out", out, dtype, Shape{plan.tokens(), width});
    if (weights) require("weights", *weights, DType::f32, Shape{plan.tokens(), plan.topk()});
    if (!options.residual.absent()) require("residual", options.residual, dtype, out.shape());
    if (weights) state->weights = weights->as<float>();
    return show_outbox(y, plan, state->operation);
  });
  state->operation.keep_advancing(state.get());
  return PendingCombine(std::move(state));
}

void PendingCombine::finish() {
  const std::unique_ptr<State> state = std::move(state_);
  const Phase phase(state->context.trace(), operation_span("finish combine"));
  state->operation.meet();
  const Plan& plan = state->plan;
  const Tensor& out = state->out;
  if (!state->results) state->read();
  const void* const* slots = state->results->finish(state->context.communicator(), state->operation, plan);
  state->context.kernels().reduce({.tokens = plan.tokens(),
                                   .topk = plan.topk(),
                                   .width = out.size(1),
                                   .dtype = out.dtype(),
                                   .slots = slots,
                                   .weights = state->weights,
                                   .residual = state->residual.data(),
                                   .out = out.data()},
                                  state->context.pool());
  state->operation.complete();
}

void combine(const Context& context, const Plan& plan, Outbox& y, std::optional<ConstTensor> weights, Tensor out,
             const CombineOptions& options) {
  start_combine(context, plan, y, weights, out, options).finish();
}

void fetch_slots(const Context& context, const Plan& plan, Outbox& values, Tensor out) {
  const Phase phase(context.trace(), operation_span("fetch_slots"));
  const std::int64_t width = values.rows().shape().rank() == 2 ? values.rows().size(1) : 0;
  Operation operation(context.communicator(),
                      Signature("fetch_slots").with("width", width).with("plan", static_cast<std::int64_t>(plan.id())),
                      context.timeout());
  operation.ready([&] {
    require("values", values.rows(), DType::f32, Shape{plan.received(), width});
    require("out", out, DType::f32, Shape{plan.tokens(), plan.topk(), width});
    return show_outbox(values, plan, operation);
  });
  operation.meet();
  const std::size_t row_bytes = at(width) * sizeof(float);
  Results results(context, operation, plan, values, row_bytes);
  const void* const* slots = results.finish(context.communicator(), operation, plan);
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
