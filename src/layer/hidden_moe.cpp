// The MoE layer of ranks that all have the same tokens.
#include <expar/hidden_moe.h>

#include <cstring>
#include <optional>
#include <string>

#include <expar/operation.h>

#include "src/layer/agree.h"
#include "src/util/check.h"

namespace expar {
namespace {

void validate(const HiddenMoeOptions& options) {
  if (options.hidden < 1) refuse("hidden is " + std::to_string(options.hidden) + ", must be at least 1");
  validate(options.router);
  if (is_collective(options.router.choice)) {
    refuse("all ranks have the same tokens: the router cannot choose over the batches of all ranks");
  }
}

Signature signature_of(const HiddenMoeOptions& options) {
  const RouterOptions& router = options.router;
  Signature signature("hidden_moe");
  signature.with("hidden", options.hidden).with("experts", router.experts).with("topk", router.topk);
  signature.with("partition", static_cast<std::int64_t>(options.partition)).with("slices", options.slices);
  return signature.with("normalize_router_logits", options.normalize_router_logits);
}

/// Columns [begin, begin + count) of `from` go to the first columns of `to`; both [T, ...].
void copy_columns(const ConstTensor& from, std::int64_t begin, std::int64_t count, const Tensor& to) {
  const std::size_t size = size_of(from.dtype()), bytes = at(count) * size;
  for (std::int64_t t = 0; t < from.size(0) && bytes > 0; ++t) {
    std::memcpy(to.bytes() + at(t * to.size(1)) * size, from.bytes() + at(t * from.size(1) + begin) * size, bytes);
  }
}

}  // namespace

struct HiddenMoe::State {
  State(const Context& context, const HiddenMoeOptions& o)
      : options(o),
        sliced(o.partition == HiddenPartition::sliced),
        part(part_of(o.hidden, context.rank(), context.size())),
        width(sliced ? (o.hidden + context.size() - 1) / context.size() : o.hidden) {}

  std::int64_t part_width() const { return part.end - part.begin; }

  void check(const HiddenMoeInputs& inputs, const Tensor& out) const;
  void choose(const Context& context, ConstTensor logits);
  /// What each rank dispatches: [T, W].
  ConstTensor rows(const Context& context, const Plan& plan, ConstTensor x);
  ConstTensor bias_rows(ConstTensor bias, std::int64_t tokens, std::int64_t columns);
  void forward(Context context, const HiddenMoeInputs& inputs, Layout layout, bool weighted,
               FunctionRef<Outbox(const Inbox&)> experts, Tensor out);

  HiddenMoeOptions options;
  bool sliced;
  Part part;
  std::int64_t width;
  Routing routing;
  Buffer row_memory, bias_memory, out_memory;
  ExpertsRecord record;
};

void HiddenMoe::State::check(const HiddenMoeInputs& inputs, const Tensor& out) const {
  const ConstTensor& x = inputs.x;
  require_rows("x", x);
  const std::int64_t tokens = x.shape().rank() == 2 ? x.size(0) : 0;
  require("x", x, x.dtype(), {tokens, options.slices ? part_width() : options.hidden});
  require("out", out, x.dtype(), {tokens, part_width()});
  if (!inputs.bias.absent()) require("bias", inputs.bias, DType::f32, {part_width()});
  if (inputs.logits.absent() == inputs.ids.absent() || inputs.ids.absent() != inputs.weights.absent()) {
    refuse("either logits are given, or ids and weights");
  }
  if (!inputs.logits.absent()) return require("logits", inputs.logits, DType::f32, {tokens, options.router.experts});
  require("ids", inputs.ids, DType::int32, {tokens, options.router.topk});
  require("weights", inputs.weights, DType::f32, inputs.ids.shape());
}

void HiddenMoe::State::choose(const Context& context, ConstTensor logits) {
  if (options.normalize_router_logits) return route(context, options.router, logits, routing);
  const RouterOptions& router = options.router;
  route(context,
        {.experts = router.experts,
         .topk = router.topk,
         .choice = Choice::logits,
         .renormalise = false,
         .nan = router.nan},
        logits, routing);
  for (std::int64_t i = 0; i < routing.ids.elements(); ++i) {
    const std::int64_t token = i / router.topk;
    routing.weights.as<float>()[i] = logits.as<float>()[token * router.experts + routing.ids.as<std::int32_t>()[i]];
  }
}

ConstTensor HiddenMoe::State::rows(const Context& context, const Plan& plan, ConstTensor x) {
  const bool whole = !sliced && !options.slices, full_slice = sliced && options.slices && part_width() == width;
  if (whole || full_slice) return x;
  const Tensor all = row_memory.view(x.dtype(), {plan.tokens(), width});
  if (!sliced) {
    join_slices(context, plan, x, all);
    return all;
  }
  if (part_width() < width && all.byte_size() > 0) std::memset(all.data(), 0, all.byte_size());
  copy_columns(x, options.slices ? 0 : part.begin, part_width(), all);
  return all;
}

ConstTensor HiddenMoe::State::bias_rows(ConstTensor bias, std::int64_t tokens, std::int64_t columns) {
  if (bias.absent()) return {};
  const Tensor all = bias_memory.view(DType::f32, {tokens, columns});
  if (all.byte_size() > 0) std::memset(all.data(), 0, all.byte_size());
  for (std::int64_t t = 0; t < tokens && bias.byte_size() > 0; ++t) {
    std::memcpy(all.as<float>() + t * columns, bias.data(), bias.byte_size());
  }
  return all;
}

void HiddenMoe::State::forward(Context c, const HiddenMoeInputs& inputs, Layout layout, bool weighted,
                               FunctionRef<Outbox(const Inbox&)> experts, Tensor out) {
  const bool routed = !inputs.logits.absent();
  if (routed) c = c.attempt([&] { choose(c, inputs.logits); });
  const ConstTensor ids = routed ? ConstTensor(routing.ids) : inputs.ids;
  const ConstTensor weights = routed ? ConstTensor(routing.weights) : inputs.weights;

  // Sliced, each rank sends its slices as tokens of its own; gathered, all of them have the same ones.
  const PlanOptions plan_options{.experts = options.router.experts};
  const Plan plan = sliced ? make_plan(c, ids, plan_options) : make_replicated_plan(c, ids, plan_options);
  const ConstTensor x = rows(c, plan, inputs.x);
  const Inbox inbox = dispatch(c, x, weights, plan, {.layout = layout});
  Outbox y;
  Tensor to = out;
  CombineOptions beside{.slice = !sliced};
  alone(c, [&] {
    y = experts(inbox);
    if (sliced && part_width() < width) to = out_memory.view(out.dtype(), {plan.tokens(), width});
    beside.shared = bias_rows(inputs.bias, plan.tokens(), to.size(1));
  });
  std::optional<ConstTensor> by_slot = unweighted;
  if (weighted) by_slot = weights;
  combine(c, plan, y, by_slot, to, beside);
  if (to.data() != out.data()) copy_columns(to, 0, part_width(), out);
}

HiddenMoe::HiddenMoe(const Context& context, const HiddenMoeOptions& options)
    : state_(std::make_unique<State>(context, options)) {
  meet(context.communicator(), signature_of(options), [&] {
    validate(options);
    return Operation::Words{};
  });
  agree_on_router(context, options.router, "hidden_moe");
}
HiddenMoe::~HiddenMoe() = default;
HiddenMoe::HiddenMoe(HiddenMoe&&) noexcept = default;

std::int64_t HiddenMoe::width() const { return state_->width; }
const Routing& HiddenMoe::routing() const { return state_->routing; }

void HiddenMoe::forward(const Context& context, const HiddenMoeInputs& inputs, const ExpertKernel& kernel, Tensor out) {
  const Context asked = context.attempt([&] {
    state_->check(inputs, out);
    if (!kernel) refuse("there is no expert kernel");
  });
  const auto experts = [&](const Inbox& inbox) {
    const Plan& plan = inbox.plan();
    Outbox y = make_outbox(context, inbox, state_->width, inputs.x.dtype());
    const bool cumulative = state_->options.group_list == GroupList::cumulative;
    kernel(
        {.rows = inbox.packed(), .group_list = cumulative ? plan.offsets().subspan(1) : plan.rows(), .out = y.rows()});
    return y;
  };
  state_->forward(asked, inputs, Layout::expert_major, true, experts, out);
}

void HiddenMoe::forward(const Context& context, const HiddenMoeInputs& inputs, const ExpertShape& shape,
                        const ExpertWeights& weights, Tensor out) {
  const Context asked = context.attempt([&] {
    state_->check(inputs, out);
    validate(shape);
    const std::int64_t width = state_->width;
    if (shape.hidden == width && shape.dtype == inputs.x.dtype()) return;
    refuse("the experts take " + std::string(name(shape.dtype)) + " rows of " + std::to_string(shape.hidden) +
           ", not " + std::string(name(inputs.x.dtype())) + " ones of " + std::to_string(width));
  });
  const auto experts = [&](const Inbox& inbox) {
    Outbox y = make_outbox(context, inbox.plan(), state_->width, inputs.x.dtype());
    experts_forward(context, shape, weights, inbox, y, state_->record);
    return y;
  };
  state_->forward(asked, inputs, Layout::indexed, shape.weights_on == WeightsOn::output, experts, out);
}

}  // namespace expar
