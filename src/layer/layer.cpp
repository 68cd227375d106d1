// The layer's public door.
#include <expar/layer.h>

#include <string>
#include <utility>

#include "src/layer/forward.h"
#include "src/layer/state.h"
#include "src/util/check.h"
#include "src/util/kept.h"

namespace expar {

std::shared_ptr<ExpertsWorkspace> make_experts_workspace() { return std::make_shared<ExpertsWorkspace>(); }

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
  if (state_->options.shared_inner == 0) refuse("this layer has no shared experts");
  state_->parameters->write_shared(up, down, gate, state_->context.pool());
}
void MoeLayer::lend(std::span<const Parameter> parameters) { state_->parameters->lend(parameters); }
std::size_t MoeLayer::parameter_bytes() const { return state_->parameters->bytes(); }
void MoeLayer::refresh() { state_->parameters->refresh(state_->context.pool()); }

std::vector<Parameter> MoeLayer::expert_parameters(std::string_view prefix) {
  return state_->parameters->experts(prefix);
}
std::vector<Parameter> MoeLayer::dense_parameters(std::string_view prefix) { return state_->parameters->dense(prefix); }
std::vector<ConstTensor> MoeLayer::dense_shard_gradients() const {
  const SharedGradients& shared = state_->shared.gradients();
  const SpecialGradients& special = state_->special.gradients();
  std::vector<ConstTensor> all;
  const auto add = [&](bool held, ConstTensor gradient) {
    if (held) all.push_back(gradient);
  };
  add(true, state_->router.weight_gradients());
  add(state_->options.router.bias, state_->router.bias_gradients());
  add(state_->options.shared_inner > 0, shared.up);
  add(state_->options.shared_inner > 0, shared.down);
  add(state_->options.shared_gate, shared.gate);
  add(state_->options.special.constant > 0, special.mix);
  add(state_->options.special.constant > 0, special.value);
  return all;
}
Tensor MoeLayer::selection_bias() { return state_->parameters->selection_bias(); }
Tensor MoeLayer::token_table() { return state_->parameters->token_table(); }

void MoeLayer::forward(const Context& context, ConstTensor x, Tensor out, ConstTensor residual,
                       const MoeInputs& inputs) {
  MoeRecord& record = state_->inference;
  PendingForward::State(*state_, context, x, out, residual, std::nullopt, inputs, record).finish();
  record.kept->inbox = {};  // nothing is kept but memory
}

void MoeLayer::forward(const Context& context, ConstTensor x, Tensor out, ConstTensor residual,
                       std::span<const std::int64_t> shards, MoeRecord& record, const MoeInputs& inputs) {
  PendingForward::State(*state_, context, x, out, residual, shards, inputs, record).finish();
}

PendingForward MoeLayer::start_forward(const Context& context, ConstTensor x, Tensor out, ConstTensor residual,
                                       std::optional<std::span<const std::int64_t>> shards, MoeRecord& record,
                                       const MoeInputs& inputs) {
  return PendingForward(
      make_kept<PendingForward::State>(context.memory(), *state_, context, x, out, residual, shards, inputs, record));
}

PendingForward::PendingForward(std::shared_ptr<State> state) : state_(std::move(state)) {}
PendingForward::PendingForward(PendingForward&&) noexcept = default;
PendingForward::~PendingForward() = default;
void PendingForward::run_experts() { state_->run_experts(); }
void PendingForward::finish() { std::exchange(state_, nullptr)->finish(); }

void MoeLayer::backward(const Context& context, MoeRecord& record, ConstTensor dout, Tensor dx) {
  state_->backward(context, record, dout, dx);
}

const MoeRecord& MoeLayer::inference_record() const { return state_->inference; }

PhaseTimes MoeLayer::take_times() { return std::exchange(state_->times, {}); }

}  // namespace expar
