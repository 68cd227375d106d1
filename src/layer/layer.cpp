// The MoE layer: composes router, plan, dispatch, experts and combine, forwards and backwards.
#include <expar/layer.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "src/layer/agree.h"
#include "src/layer/convert.h"
#include "src/layer/jitter.h"
#include "src/layer/parameters.h"
#include "src/layer/shared_expert.h"
#include "src/layer/shared_ranks.h"
#include "src/layer/slices.h"
#include "src/layer/special_part.h"

namespace expar {
namespace {

[[noreturn]] void refuse(std::string message) { throw Error(ErrorCode::bad_argument, std::move(message)); }

void check_shards(std::span<const std::int64_t> shards, std::int64_t tokens) {
  bool right = !shards.empty() && shards.front() == 0 && shards.back() == tokens;
  for (std::size_t s = 1; right && s < shards.size(); ++s) right = shards[s - 1] <= shards[s];
  if (right) return;
  std::string text;
  for (const std::int64_t s : shards) text += (text.empty() ? "" : ", ") + std::to_string(s);
  refuse("shards are [" + text + "], should ascend from 0 to the " + std::to_string(tokens) + " tokens of this rank");
}

std::int64_t valid_tokens(const ConstTensor& x, const ConstTensor& mask) {
  if (mask.absent()) return x.size(0);
  const auto* valid = mask.as<std::int8_t>();
  return x.size(0) - std::count(valid, valid + x.size(0), std::int8_t{0});
}

/// The rows with zeros in place of padding, of which shared experts make zeros, forwards and backwards.
ConstTensor without_padding(const ConstTensor& rows, const ConstTensor& mask, Buffer& memory) {
  if (mask.absent()) return rows;
  const Tensor copy = memory.view(rows.dtype(), rows.shape());
  std::memset(copy.data(), 0, copy.byte_size());
  for (std::int64_t t = 0; t < rows.size(0); ++t) {
    if (mask.as<std::int8_t>()[t] == 0) continue;
    const ConstTensor row = rows.rows(t, 1);
    std::memcpy(copy.rows(t, 1).data(), row.data(), row.byte_size());
  }
  return copy;
}

}  // namespace

struct MoeLayer::State {
  State(const Context& c, const MoeLayerOptions& o)
      : context(c), options(o), special(options), slices(context, options) {
    agree(context, options, [&] {
      if (options.shared_ranks > 0) apart.emplace(options, context.rank(), context.size());
      range = apart ? apart->routed() : experts_of(context.rank(), context.size(), options.routed_experts());
      parameters.emplace(options, range, slices.own(), holds_shared(), context.kernels());
    });
    shape = options.expert_shape();
    shape.inner = slices.own().count;
    shared_shape = options.shared_shape();
    // Combine weighs the rows of all experts or of none.
    if (apart && shape.weights_on != WeightsOn::output) shared_shape.weights_on = WeightsOn::inner;
    workspace = options.workspace ? options.workspace : std::make_shared<ExpertsWorkspace>();
  }

  Context context;  // the one it was made with, for what is called without one
  MoeLayerOptions options;
  ExpertShape shape, shared_shape;
  ExpertRange range;
  std::optional<SharedRanks> apart;  // where shared experts have ranks of their own
  SpecialPart special;
  Slices slices;
  std::optional<LayerParameters> parameters;
  PhaseTimes times;

  MoeRecord inference;
  std::shared_ptr<ExpertsWorkspace> workspace;
  Buffer wide_x, jittered_x, logits, dlogits, dweights, router_dx, low_router_dx, shard_memory, bias_shard_memory;
  Tensor shard_gradients, bias_shard_gradients;
  Buffer shared_up_memory, shared_down_memory, shared_gate_memory, shared_x, shared_dout, wide_dout, special_dx,
      rerouted_ids;
  SharedGradients shared_gradients;
  SharedScratch shared_scratch;

  // ---- forward
  void check_forward(const Context& c, ConstTensor x, Tensor out, ConstTensor residual, const MoeInputs& inputs) const;
  void check_training(ConstTensor x, Tensor out, std::span<const std::int64_t> shards) const;
  void check_trains() const {
    if (options.inference) refuse("the layer is for inference alone (MoeLayerOptions::inference)");
  }
  static ConstTensor wide(const Context& c, ConstTensor x, Buffer& memory);
  ConstTensor wide(const Context& c, ConstTensor x) { return wide(c, x, wide_x); }
  Jitter jitter_of(const MoeRecord& record, ConstTensor mask) const;
  ConstTensor router_input(const Context& c, ConstTensor x, const std::optional<Jitter>& jitter);
  ConstTensor score(const Context& c, ConstTensor x, const std::optional<Jitter>& jitter);
  RouterOptions router_for(bool training) const;
  RouteInputs route_inputs(const MoeInputs& inputs, const MoeRecord& record);
  void forward(const Context& c, ConstTensor x, Tensor out, ConstTensor residual,
               std::optional<std::span<const std::int64_t>> shards, const MoeInputs& inputs, MoeRecord& record);
  Inbox dispatch_beside(const Context& c, ConstTensor rows, ConstTensor weights, const Plan& plan,
                        const DispatchOptions& dispatch_options, double* ms, FunctionRef<void()> work);
  ConstTensor gate_input(const Context& c, ConstTensor x) { return options.shared_gate ? wide(c, x) : ConstTensor(); }
  bool has_shared() const { return options.shared_inner > 0; }
  bool shares_beside() const { return has_shared() && !apart; }
  bool holds_shared() const { return apart ? apart->hold_here() : has_shared(); }
  ConstTensor with_shared_weight(const Context& c, ConstTensor x, ConstTensor weights);
  void run_experts(const Context& c, const ExpertShape& as, const ExpertWeights& weights, const Inbox& inbox,
                   const Plan& plan, Outbox& y, ExpertsRecord& record);

  // ---- backward
  void check_backward(const Context& c, const MoeRecord& record, ConstTensor dout, Tensor dx) const;
  Tensor shared_backward(const Context& c, const MoeRecord& record, ConstTensor dout);
  Tensor own_backward(const Context& c, const MoeRecord& record, ConstTensor dout);
  ConstTensor router_backward(const Context& c, const MoeRecord& record, ConstTensor by_slot);
  void backward(const Context& c, MoeRecord& record, ConstTensor dout, Tensor dx);

  void check(const Context& c) const;
  void require(const char* what, const ConstTensor& tensor, std::int64_t tokens) const {
    const Shape wanted{tokens, options.hidden};
    if (tensor.dtype() == options.dtype && tensor.shape() == wanted) return;
    refuse(std::string(what) + " is " + std::string(name(tensor.dtype())) + " " + tensor.shape().str() +
           ", should be " + std::string(name(options.dtype)) + " " + wanted.str());
  }
};

void MoeLayer::State::check(const Context& c) const {
  if (c.size() == context.size() && c.rank() == context.rank()) return;
  refuse("the layer was made for rank " + std::to_string(context.rank()) + " of " + std::to_string(context.size()) +
         ", the context is rank " + std::to_string(c.rank()) + " of " + std::to_string(c.size()));
}

// ---- forward

void MoeLayer::State::check_forward(const Context& c, ConstTensor x, Tensor out, ConstTensor residual,
                                    const MoeInputs& inputs) const {
  check(c);
  const std::int64_t tokens = x.shape().rank() == 2 ? x.size(0) : 0;
  require("x", x, tokens);
  require("out", out, tokens);
  if (!residual.absent()) require("residual", residual, tokens);
  if (inputs.mask.absent() || (inputs.mask.dtype() == DType::int8 && inputs.mask.shape() == Shape{tokens})) return;
  refuse("mask is " + std::string(name(inputs.mask.dtype())) + " " + inputs.mask.shape().str() + ", should be int8 " +
         Shape{tokens}.str());
}

void MoeLayer::State::check_training(ConstTensor x, Tensor out, std::span<const std::int64_t> shards) const {
  check_trains();
  if (x.elements() > 0 && out.data() == x.data()) refuse("out must not be x, which the backward pass reads");
  check_shards(shards, x.size(0));
}

/// The tokens in f32.
ConstTensor MoeLayer::State::wide(const Context& c, ConstTensor x, Buffer& memory) {
  if (x.dtype() == DType::f32) return x;
  const Tensor converted = memory.view(DType::f32, x.shape());
  to_f32(x, converted, c.pool());
  return converted;
}

Jitter MoeLayer::State::jitter_of(const MoeRecord& record, ConstTensor mask) const {
  return {Random(record.seed, record.stream), options.router.jitter, record.first_token, mask};
}

/// The tokens as the router reads them.
ConstTensor MoeLayer::State::router_input(const Context& c, ConstTensor x, const std::optional<Jitter>& jitter) {
  const ConstTensor plain = wide(c, x);
  if (!jitter) return plain;
  const Tensor read = jittered_x.view(DType::f32, x.shape());
  std::memcpy(read.data(), plain.data(), plain.byte_size());
  jitter->apply(read, c.pool());
  return read;
}

/// The logits.
ConstTensor MoeLayer::State::score(const Context& c, ConstTensor x, const std::optional<Jitter>& jitter) {
  const std::int64_t tokens = x.size(0);
  const Tensor result = logits.view(DType::f32, {tokens, options.router.experts});
  const std::int64_t all[2] = {0, tokens};
  GemmNT call;
  call.groups = {1, all};
  call.n = options.router.experts;
  call.k = options.hidden;
  call.rows = {.base = {router_input(c, x, jitter).data(), nullptr}, .dtype = DType::f32, .width = options.hidden};
  call.w = {parameters->router().data(), DType::f32, false};
  if (options.router.bias) call.bias = parameters->router_bias().as<float>();
  call.y = result.data();
  if (tokens > 0) c.kernels().gemm_nt(call, c.pool());
  return result;
}

/// Sinkhorn balances what is learnt; at inference each token chooses for itself, whatever else is in the batch.
RouterOptions MoeLayer::State::router_for(bool training) const {
  RouterOptions router = options.router;
  if (!training && router.choice == Choice::sinkhorn) router.choice = Choice::logits;
  return router;
}

RouteInputs MoeLayer::State::route_inputs(const MoeInputs& inputs, const MoeRecord& record) {
  RouteInputs read;
  read.selection_bias = parameters->selection_bias();
  read.mask = inputs.mask;
  read.ids = inputs.ids;
  if (inputs.ids.absent()) {
    read.tokens = inputs.tokens;
    read.token_table = parameters->token_table();
  }
  read.first_token = record.first_token;
  return read;
}

void MoeLayer::State::forward(const Context& c, ConstTensor x, Tensor out, ConstTensor residual,
                              std::optional<std::span<const std::int64_t>> shards, const MoeInputs& inputs,
                              MoeRecord& record) {
  const bool keeps = shards && !options.recompute;
  record.plan = {};  // until this call has succeeded there is nothing to go backward from
  record.inbox = {};
  record.y = {};
  ExpertWeights weights;
  SharedWeights shared_weights;
  SharedRecord& shared = keeps ? record.shared : workspace->shared;
  PlanOptions plan_options;
  plan_options.experts = apart ? apart->experts() : options.routed_experts();
  if (apart) plan_options.first_experts = apart->first_experts();
  plan_options.bound = shards ? 0 : options.bound;
  ConstTensor scored;
  {
    const Phase phase(c.trace(), "route", &times.route);
    plan_options.failure = attempt([&] {
      check_forward(c, x, out, residual, inputs);
      if (shards) check_training(x, out, *shards);
      weights = shards ? parameters->plain() : parameters->for_inference(c.kernels(), c.pool());
      shared_weights = shards ? parameters->shared() : parameters->shared_for_inference(c.kernels(), c.pool());
      record.seed = inputs.seed;
      record.stream = inputs.stream;
    });
    const bool shakes = shards && options.router.jitter > 0.0F;
    if (shakes || options.router.choice == Choice::round_robin) {
      const std::int64_t tokens = plan_options.failure ? 0 : valid_tokens(x, inputs.mask);
      record.first_token = tokens_before(c, tokens, plan_options.failure);
    }
    if (!plan_options.failure) {
      plan_options.failure =
          attempt([&] { scored = score(c, x, shakes ? std::optional(jitter_of(record, inputs.mask)) : std::nullopt); });
    }
    const RouterOptions router = router_for(shards.has_value());
    RouteInputs route_in = route_inputs(inputs, record);
    route_in.failure = plan_options.failure;
    const auto choose = [&] { route(c, router, scored, record.routing, route_in); };
    if (is_collective(router.choice) && inputs.ids.absent()) {
      choose();
    } else {
      plan_options.failure = attempt(choose);
    }
    if (plan_options.failure) record.routing.ids = Tensor(nullptr, DType::int32, {0, slots_of(options.router)});
  }
  Plan plan;
  Capacity& capacity = record.capacity;
  {
    const Phase phase(c.trace(), "plan", &times.dispatch);
    const Tensor chosen = record.routing.ids;  // neither capacity nor plan knows special experts
    record.routing.ids = special.routed(chosen, record.routed_ids);
    bound_rows(c, options.capacity, options.routed_experts(), record.routing, capacity, plan_options.failure);
    record.routing.ids = chosen;
    ConstTensor ids = capacity.ids;
    if (apart && !plan_options.failure) {
      plan_options.failure = attempt([&] { ids = apart->ids(capacity.ids, record.routing.mask); });
    }
    plan = make_plan(c, ids, plan_options);
  }
  if (shards) {
    const Phase phase(c.trace(), "route", &times.route);
    record.x = x;
    record.shards.assign(shards->begin(), shards->end());
    // The losses look at what the router wanted, dropped or not.
    const auto counts = capacity.chosen.empty() ? plan.expert_totals() : std::span<const std::int64_t>(capacity.chosen);
    const std::vector<std::int64_t> wanted = special.counts(c, record.routing, counts);
    record.losses = router_losses(c, options.router, record.routing, wanted, *shards, inputs.losses);
  }
  if (options.capacity.policy == CapacityPolicy::reroute) {
    const Phase phase(c.trace(), "route", &times.route);
    const MoeInputs rerouted{.mask = inputs.mask,
                             .ids = special.restored(capacity.ids, record.routing.ids, rerouted_ids)};
    alone(c, [&] { route(c, options.router, scored, record.routing, route_inputs(rerouted, record)); });
    capacity.weights = record.routing.weights;
  }
  ConstTensor weights_by_slot = capacity.weights;
  if (apart && !plan_options.failure) alone(c, [&] { weights_by_slot = with_shared_weight(c, x, capacity.weights); });
  CombineOptions beside{.residual = residual, .norm = inputs.norm, .sum_over = options.tensor};
  record.inbox = dispatch_beside(c, x, weights_by_slot, plan, {.payload = options.payload}, &times.dispatch, [&] {
    if (shares_beside()) {
      const ConstTensor tokens = without_padding(x, record.routing.mask, shared_x);
      shared_forward(c, shared_shape, shared_weights, tokens, gate_input(c, tokens), shared);
      beside.shared = shared.y;
      beside.shared_weights = shared.gate;
    }
    if (special) {
      const SpecialPass pass = special.pass(record.routing, wide(c, x), *parameters);
      beside.shared = special.forward(c, pass, beside.shared, beside.shared_weights);
      beside.shared_weights = {};
    }
  });
  plan = record.inbox.plan();
  {
    const Phase phase(c.trace(), "experts", &times.experts);
    const bool runs_shared = apart && apart->hold_here();
    alone(c, [&] {
      run_experts(c, runs_shared ? shared_shape : shape, runs_shared ? shared_weights.expert : weights, record.inbox,
                  plan, record.y, keeps ? record.experts : workspace->record);
    });
  }
  {
    const Phase phase(c.trace(), "combine", &times.combine);
    std::optional<ConstTensor> by_slot = unweighted;
    if (shape.weights_on == WeightsOn::output) by_slot = weights_by_slot;
    combine(c, plan, record.y, by_slot, out, beside);
  }
  if (!keeps) record.y = {};
  record.plan = std::move(plan);
}

/// The weights of all slots, where shared experts have ranks of their own.
ConstTensor MoeLayer::State::with_shared_weight(const Context& c, ConstTensor x, ConstTensor weights) {
  Tensor gate;
  if (options.shared_gate) {
    gate = workspace->shared.gate_memory.view(DType::f32, {x.size(0)});
    open_gate(c, parameters->shared().gate, wide(c, x), gate);
  }
  return apart->weights(weights, gate);
}

/// Dispatches; `work` for what each rank computes of its own tokens is done while rows are on their way.
Inbox MoeLayer::State::dispatch_beside(const Context& c, ConstTensor rows, ConstTensor weights, const Plan& plan,
                                       const DispatchOptions& dispatch_options, double* ms, FunctionRef<void()> work) {
  std::optional<Phase> phase(std::in_place, c.trace(), "dispatch", ms);
  PendingDispatch pending = start_dispatch(c, rows, weights, plan, dispatch_options);
  if ((shares_beside() || special) && !dispatch_options.failure) {
    phase.emplace(c.trace(), "shared experts", ms == nullptr ? nullptr : &times.experts);
    alone(c, work);
    phase.emplace(c.trace(), "dispatch", ms);
  }
  return pending.finish();
}

void MoeLayer::State::run_experts(const Context& c, const ExpertShape& as, const ExpertWeights& weights,
                                  const Inbox& inbox, const Plan& plan, Outbox& y, ExpertsRecord& record) {
  y = make_outbox(c, plan, options.hidden, options.dtype);
  experts_forward(c, as, weights, inbox, y, record);
}

// ---- backward

void MoeLayer::State::check_backward(const Context& c, const MoeRecord& record, ConstTensor dout, Tensor dx) const {
  check(c);
  require("dout", dout, record.x.size(0));
  require("dx", dx, record.x.size(0));
}

/// From the gradient of the weights to those of the router's parameters; returns the router's part of dx, of dtype.
ConstTensor MoeLayer::State::router_backward(const Context& c, const MoeRecord& record, ConstTensor by_slot) {
  const std::int64_t tokens = record.x.size(0);
  const std::int64_t experts = options.router.experts;
  const Tensor dz = dlogits.view(DType::f32, {tokens, experts});
  route_backward(c, options.router, record.routing, record.losses, by_slot, dz);

  const auto count = static_cast<int>(record.shards.size()) - 1;
  shard_gradients = shard_memory.view(DType::f32, {count, experts, options.hidden});
  GemmTN to_weight;
  to_weight.groups = {count, record.shards.data()};
  to_weight.n = experts;
  to_weight.k = options.hidden;
  to_weight.dy = dz.data();
  std::optional<Jitter> jitter;
  if (options.router.jitter > 0.0F) jitter = jitter_of(record, record.routing.mask);
  to_weight.rows = {
      .base = {router_input(c, record.x, jitter).data(), nullptr}, .dtype = DType::f32, .width = options.hidden};
  to_weight.dw = shard_gradients.as<float>();
  if (options.router.bias) {
    bias_shard_gradients = bias_shard_memory.view(DType::f32, {count, experts});
    to_weight.dbias = bias_shard_gradients.as<float>();
  }
  c.kernels().gemm_tn(to_weight, c.pool());

  const Tensor dx = router_dx.view(DType::f32, {tokens, options.hidden});
  const std::int64_t all[2] = {0, tokens};
  GemmNN to_x;
  to_x.groups = {1, all};
  to_x.n = experts;
  to_x.k = options.hidden;
  to_x.dy = dz.data();
  to_x.w = {parameters->router().data(), DType::f32, false};
  to_x.dx = dx.data();
  if (tokens > 0) c.kernels().gemm_nn(to_x, c.pool());
  if (jitter) jitter->apply(dx, c.pool());
  if (options.dtype == DType::f32) return dx;
  const Tensor low = low_router_dx.view(DType::bf16, {tokens, options.hidden});
  to_bf16(dx, low, c.pool());
  return low;
}

/// Returns the shared experts' part of dx, [T, H] f32.
Tensor MoeLayer::State::shared_backward(const Context& c, const MoeRecord& record, ConstTensor dout) {
  const ConstTensor x = without_padding(record.x, record.routing.mask, shared_x);
  const ConstTensor for_gate = gate_input(c, x);
  const SharedWeights weights = parameters->shared();
  if (options.recompute) shared_forward(c, shared_shape, weights, x, for_gate, workspace->shared);
  const auto shards = static_cast<std::int64_t>(record.shards.size()) - 1;
  SharedGradients& to = shared_gradients;
  to.up = shared_up_memory.view(DType::f32, {shards, shared_shape.up_rows(), options.hidden});
  to.down = shared_down_memory.view(DType::f32, {shards, options.hidden, options.shared_inner});
  if (options.shared_gate) to.gate = shared_gate_memory.view(DType::f32, {shards, options.hidden});
  return expar::shared_backward(c, shared_shape, weights, x, for_gate, record.shards,
                                without_padding(dout, record.routing.mask, shared_dout),
                                options.recompute ? workspace->shared : record.shared, to, shared_scratch);
}

/// The same of all that each rank computed of its own tokens; absent: nothing.
Tensor MoeLayer::State::own_backward(const Context& c, const MoeRecord& record, ConstTensor dout) {
  if (shares_beside()) return shared_backward(c, record, dout);
  const Tensor dx = special_dx.view(DType::f32, record.x.shape());
  std::memset(dx.data(), 0, dx.byte_size());
  return dx;
}

void MoeLayer::State::backward(const Context& c, MoeRecord& record, ConstTensor dout, Tensor dx) {
  const Phase phase(c.trace(), "backward", &times.backward);
  parameters->expect_step();
  DispatchOptions dispatch_options;
  dispatch_options.lists_of = &record.inbox;
  dispatch_options.payload = options.gradient_payload;
  dispatch_options.failure = attempt([&] {
    check_trains();
    if (!record.plan) refuse("the record holds no forward pass for training");
    check_backward(c, record, dout, dx);
  });
  CombineOptions combine_options{.sum_over = options.tensor};
  Tensor beside;  // dx of what each rank computed of its own tokens
  const Inbox gradients = dispatch_beside(c, dout, {}, record.plan, dispatch_options, nullptr,
                                          [&] { beside = own_backward(c, record, dout); });

  Outbox dx_rows;
  Outbox dweights_rows;
  Tensor fetched;
  alone(c, [&] {
    const Phase part(c.trace(), "experts");
    dx_rows = make_outbox(c, record.plan, options.hidden, options.dtype);
    dweights_rows = make_outbox(c, record.plan, 1, DType::f32);
    const ExpertWeights weights = parameters->plain();
    Outbox y_again;
    if (options.recompute) run_experts(c, shape, weights, record.inbox, record.plan, y_again, workspace->record);
    const Outbox& y = options.recompute ? y_again : record.y;
    const ExpertsRecord& made = options.recompute ? workspace->record : record.experts;
    experts_backward(c, shape, weights, record.inbox, gradients, y, made, parameters->gradients(), dx_rows,
                     dweights_rows, workspace->scratch);
    fetched = dweights.view(DType::f32, {record.plan.tokens(), record.plan.topk(), 1});
  });
  fetch_slots(c, record.plan, dweights_rows, fetched);
  slices.sum(fetched);

  // The router's part of dx is rounded to dtype and then added last to the experts' rows: an order that is the same
  // for every P.
  alone(c, [&] {
    const Phase part(c.trace(), "route");
    const Tensor by_slot(fetched.data(), DType::f32, record.routing.weights.shape());
    if (special) {
      const SpecialPass pass = special.pass(record.routing, wide(c, record.x), *parameters);
      special.backward(c, pass, record.shards, wide(c, dout, wide_dout), beside, by_slot);
    }
    combine_options.shared = beside;
    combine_options.residual = router_backward(c, record, by_slot);
  });
  const Phase part(c.trace(), "combine");
  combine(c, record.plan, dx_rows, unweighted, dx, combine_options);
}

// ---- the public door

MoeLayer::MoeLayer(const Context& context, const MoeLayerOptions& options)
    : state_(std::make_unique<State>(context, options)) {}
MoeLayer::~MoeLayer() = default;
MoeLayer::MoeLayer(MoeLayer&&) noexcept = default;

const MoeLayerOptions& MoeLayer::options() const { return state_->options; }
ExpertRange MoeLayer::local_experts() const { return state_->range; }
ExpertRange MoeLayer::local_inner() const { return state_->slices.own(); }
bool MoeLayer::holds_shared() const { return state_->holds_shared(); }

void MoeLayer::initialise(std::uint64_t seed, std::string_view prefix) {
  state_->parameters->initialise(seed, prefix, state_->context.pool());
}
void MoeLayer::write_expert(std::int64_t expert, const ExpertSource& from) {
  const ExpertRange& range = state_->range;
  const std::int64_t e = expert - range.first;
  if (e < 0 || e >= range.count) {
    refuse("expert " + std::to_string(expert) + " is none of the " + std::to_string(range.count) + " from " +
           std::to_string(range.first) + " on that this rank holds");
  }
  state_->parameters->write(e, from, state_->context.pool());
}
void MoeLayer::write_shared(ConstTensor up, ConstTensor down, ConstTensor gate) {
  if (!state_->has_shared()) refuse("this layer has no shared experts");
  state_->parameters->write_shared(up, down, gate, state_->context.pool());
}
std::size_t MoeLayer::parameter_bytes() const { return state_->parameters->bytes(); }
void MoeLayer::refresh() { state_->parameters->refresh(state_->context.pool()); }

std::vector<Parameter> MoeLayer::expert_parameters(std::string_view prefix) {
  return state_->parameters->experts(prefix);
}
Parameter MoeLayer::router_parameter(std::string_view prefix) { return state_->parameters->router(prefix); }
ConstTensor MoeLayer::router_shard_gradients() const { return state_->shard_gradients; }
Parameter MoeLayer::router_bias_parameter(std::string_view prefix) {
  if (!state_->options.router.bias) refuse("this layer's router has no bias");
  return state_->parameters->router_bias(prefix);
}
ConstTensor MoeLayer::router_bias_shard_gradients() const {
  if (!state_->options.router.bias) refuse("this layer's router has no bias");
  return state_->bias_shard_gradients;
}
Tensor MoeLayer::selection_bias() { return state_->parameters->selection_bias(); }
Tensor MoeLayer::token_table() { return state_->parameters->token_table(); }
std::vector<Parameter> MoeLayer::shared_parameters(std::string_view prefix) {
  return state_->parameters->shared(prefix);
}
std::vector<Parameter> MoeLayer::special_parameters(std::string_view prefix) {
  return state_->parameters->special(prefix);
}
std::vector<ConstTensor> MoeLayer::special_shard_gradients() const {
  if (state_->options.special.constant == 0) return {};
  return {state_->special.gradients().mix, state_->special.gradients().value};
}
std::vector<ConstTensor> MoeLayer::shared_shard_gradients() const {
  if (!state_->has_shared()) return {};
  const SharedGradients& of = state_->shared_gradients;
  std::vector<ConstTensor> all = {of.up, of.down};
  if (state_->options.shared_gate) all.push_back(of.gate);
  return all;
}

void MoeLayer::forward(const Context& context, ConstTensor x, Tensor out, ConstTensor residual,
                       const MoeInputs& inputs) {
  MoeRecord& record = state_->inference;
  state_->forward(context, x, out, residual, std::nullopt, inputs, record);
  record.inbox = {};  // nothing is kept but memory
}

void MoeLayer::forward(const Context& context, ConstTensor x, Tensor out, ConstTensor residual,
                       std::span<const std::int64_t> shards, MoeRecord& record, const MoeInputs& inputs) {
  state_->forward(context, x, out, residual, shards, inputs, record);
}

void MoeLayer::backward(const Context& context, MoeRecord& record, ConstTensor dout, Tensor dx) {
  state_->backward(context, record, dout, dx);
}

const MoeRecord& MoeLayer::last() const { return state_->inference; }

PhaseTimes MoeLayer::take_times() { return std::exchange(state_->times, {}); }

}  // namespace expar
