// A layer's forward pass: router, plan, dispatch, experts, combine.
#include "src/layer/forward.h"

#include <string>
#include <utility>

#include "src/layer/agree.h"
#include "src/layer/convert.h"
#include "src/util/check.h"

namespace expar {
namespace {

/// Sinkhorn balances what is learnt; at inference each token chooses for itself, whatever else is in the batch.
RouterOptions router_for(const MoeLayerOptions& options, bool trains) {
  RouterOptions router = options.router;
  if (!trains && router.choice == Choice::sinkhorn) router.choice = Choice::logits;
  return router;
}

}  // namespace

PendingForward::State::State(MoeLayer::State& layer, const Context& context, ConstTensor x, Tensor out,
                             ConstTensor residual, Shards shards, const MoeInputs& inputs, MoeRecord& record)
    : layer_(layer),
      context_(context),
      record_(record),
      kept_(kept_of(record)),
      out_(out),
      trains_(shards.has_value()),
      keeps_(trains_ && !layer.options.recompute),
      workspace_(layer.workspaces.borrow()),
      added_{.residual = residual, .norm = inputs.norm, .sum_over = layer.options.tensor} {
  record_.plan = {};  // until this pass has succeeded there is nothing to go backward from
  kept_.inbox = {};
  kept_.y = {};
  PhaseTimes& times = layer_.times;
  {
    const Phase phase(context_.trace(), "route", &times.route);
    context_ = context_.attempt([&] { check(x, residual, shards, inputs); });
    choose(x, inputs);
  }
  {
    const Phase phase(context_.trace(), "plan", &times.dispatch);
    make_plan_of_choice();
  }
  {
    const Phase phase(context_.trace(), "route", &times.route);
    if (trains_) {
      kept_.x = x;
      count_losses(*shards, inputs);
    }
    if (layer_.options.capacity.policy == CapacityPolicy::reroute) weigh_rerouted(inputs);
    weights_by_slot_ = record_.capacity.weights;
    if (layer_.apart && !context_.declines()) alone(context_, [&] { add_shared_slot(x); });
  }
  {
    const Phase phase(context_.trace(), "dispatch", &times.dispatch);
    rows_.emplace(start_dispatch(context_, x, weights_by_slot_, plan_, {.payload = layer_.options.payload}));
  }
  if (!layer_.has_own_part() || context_.declines()) return;
  const Phase phase(context_.trace(), "shared experts", &times.experts);
  alone(context_, [&] { compute_own_part(x); });
}

void PendingForward::State::check(ConstTensor x, ConstTensor residual, const Shards& shards,
                                  const MoeInputs& inputs) const {
  layer_.check_context(context_);
  layer_.parameters->check_lent();
  const std::int64_t tokens = x.shape().rank() == 2 ? x.size(0) : 0;
  layer_.check_rows("x", x, tokens);
  layer_.check_rows("out", out_, tokens);
  if (!residual.absent()) layer_.check_rows("residual", residual, tokens);
  if (!inputs.mask.absent()) require("mask", inputs.mask, DType::int8, {tokens});
  if (!shards) return;
  layer_.check_trains();
  if (x.elements() > 0 && out_.data() == x.data()) refuse("out must not be x, which the backward pass reads");
  require_ascending("shards", *shards, tokens);
}

RouteInputs PendingForward::State::route_inputs(const MoeInputs& inputs) const {
  RouteInputs read;
  read.selection_bias = layer_.parameters->selection_bias();
  read.mask = inputs.mask;
  read.ids = inputs.ids;
  if (inputs.ids.absent()) {
    read.tokens = inputs.tokens;
    read.token_table = layer_.parameters->token_table();
  }
  read.first_token = kept_.first_token;
  return read;
}

/// Experts and weights of each token, into the record.
void PendingForward::State::choose(ConstTensor x, const MoeInputs& inputs) {
  const RouterOptions router = router_for(layer_.options, trains_);
  LayerParameters& parameters = *layer_.parameters;
  const bool shakes = trains_ && router.jitter > 0.0F;
  kept_.seed = inputs.seed;
  kept_.stream = inputs.stream;
  if (shakes || router.choice == Choice::round_robin) {
    kept_.first_token = tokens_before(context_, x, inputs.mask);
  }
  context_ = context_.attempt([&] {
    const Kernels& kernels = context_.kernels();
    weights_ = trains_ ? parameters.plain() : parameters.for_inference(kernels, context_.pool());
    shared_weights_ = trains_ ? parameters.shared() : parameters.shared_for_inference(kernels, context_.pool());
    logits_ =
        layer_.router.score(context_, parameters, x, shakes ? layer_.jitter_of(record_, inputs.mask) : std::nullopt);
  });
  const auto go = [&] { route(context_, router, logits_, record_.routing, route_inputs(inputs)); };
  if (is_collective(router.choice) && inputs.ids.absent()) {
    go();
  } else {
    context_ = context_.attempt(go);
  }
}

void PendingForward::State::make_plan_of_choice() {
  const MoeLayerOptions& options = layer_.options;
  Tensor routed;  // neither capacity nor plan knows special experts
  context_ = context_.attempt([&] { routed = layer_.special.routed(record_.routing.ids, kept_.routed_ids); });
  bound_rows(context_, options.capacity, options.routed_experts(), routed, record_.routing, record_.capacity);
  ConstTensor ids = record_.capacity.ids;
  PlanOptions plan_options{.experts = options.routed_experts()};
  if (layer_.apart) {
    plan_options.experts = layer_.apart->experts();
    plan_options.first_experts = layer_.apart->first_experts();
    context_ = context_.attempt([&] { ids = layer_.apart->ids(ids, record_.routing.mask); });
  }
  plan_ = trains_ || options.bound == 0 ? make_plan(context_, ids, plan_options)
                                        : make_bounded_plan(context_, ids, options.bound, plan_options);
}

/// They look at what the router wanted, dropped or not.
void PendingForward::State::count_losses(std::span<const std::int64_t> shards, const MoeInputs& inputs) {
  kept_.shards.assign(shards.begin(), shards.end());
  const std::vector<std::int64_t>& chosen = record_.capacity.chosen;
  const auto counts = chosen.empty() ? plan_.expert_totals() : std::span<const std::int64_t>(chosen);
  const std::vector<std::int64_t> wanted = layer_.special.counts(context_, record_.routing, counts);
  record_.losses = router_losses(context_, layer_.options.router, record_.routing, wanted, shards, inputs.losses);
}

/// The weights of the slots that the capacity sent elsewhere.
void PendingForward::State::weigh_rerouted(const MoeInputs& inputs) {
  Buffer& memory = workspace_->rerouted_ids;
  const MoeInputs rerouted{.mask = inputs.mask,
                           .ids = layer_.special.restored(record_.capacity.ids, record_.routing.ids, memory)};
  alone(context_, [&] {
    route(context_, router_for(layer_.options, trains_), logits_, record_.routing, route_inputs(rerouted));
  });
  record_.capacity.weights = record_.routing.weights;
}

/// Where shared experts have ranks of their own, they are one slot more.
void PendingForward::State::add_shared_slot(ConstTensor x) {
  Tensor gate;
  if (layer_.options.shared_gate) {
    gate = workspace_->shared.gate_memory.view(DType::f32, {x.size(0)});
    const ConstTensor wide = in_f32(x, workspace_->wide, context_.pool());
    open_gate(context_, layer_.parameters->shared().gate, wide, gate);
  }
  weights_by_slot_ = layer_.apart->weights(weights_by_slot_, gate, workspace_->slot_weights);
}

/// Shared and special experts, of this rank's own tokens.
void PendingForward::State::compute_own_part(ConstTensor x) {
  if (layer_.shares_here()) {
    SharedRecord& made = shared_made();
    layer_.shared.forward(context_, shared_weights_, x, record_.routing.mask, made);
    added_.shared = made.y;
    added_.shared_weights = made.gate;
  }
  if (layer_.special) {
    const ConstTensor wide = in_f32(x, workspace_->wide, context_.pool());
    const SpecialPass pass = layer_.special.pass(record_.routing, wide, *layer_.parameters);
    added_.shared = layer_.special.forward(context_, pass, added_.shared, added_.shared_weights, workspace_->special);
    added_.shared_weights = {};
  }
}

void PendingForward::State::run_experts() {
  PhaseTimes& times = layer_.times;
  {
    const Phase phase(context_.trace(), "dispatch", &times.dispatch);
    kept_.inbox = rows_->finish();
    plan_ = kept_.inbox.plan();
  }
  {
    const Phase phase(context_.trace(), "experts", &times.experts);
    alone(context_, [&] {
      const ExpertWeights& weights = layer_.serves_shared() ? shared_weights_.expert : weights_;
      kept_.y = make_outbox(context_, plan_, layer_.options.hidden, layer_.options.dtype);
      experts_forward(context_, layer_.shape, weights, kept_.inbox, kept_.y, made());
    });
  }
  const Phase phase(context_.trace(), "combine", &times.combine);
  std::optional<ConstTensor> weights = unweighted;
  if (layer_.options.weights_on == WeightsOn::output) weights = weights_by_slot_;
  results_.emplace(start_combine(context_, plan_, kept_.y, weights, out_, added_));
}

void PendingForward::State::finish() {
  if (!results_) run_experts();
  const Phase phase(context_.trace(), "combine", &layer_.times.combine);
  results_->finish();
  if (!keeps_) kept_.y = {};
  record_.plan = std::move(plan_);
}

}  // namespace expar
