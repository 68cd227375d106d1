// Composes embedding, MoE blocks and head, forward and backward.
#include "models/text_model.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include <expar/collectives.h>

namespace expar {
namespace {

constexpr std::int64_t kBytes = 256;

void require_positive(std::string_view name, std::int64_t value) {
  if (value >= 1) return;
  throw Error(ErrorCode::bad_argument, std::string(name) + " " + std::to_string(value) + " is not at least 1");
}

std::string prefix(std::size_t layer) { return "layers." + std::to_string(layer); }
/// As a trace shows it.
std::string shown(std::size_t layer) { return "layer " + std::to_string(layer); }

// The same elements as one row each of the leading extent, or as one row.
Tensor flat(ConstTensor tensor) { return {const_cast<void*>(tensor.data()), tensor.dtype(), {tensor.elements()}}; }
ConstTensor flat_rows(ConstTensor tensor) {
  std::int64_t width = 1;
  for (int axis = 1; axis < tensor.shape().rank(); ++axis) width *= tensor.size(axis);
  return {tensor.data(), tensor.dtype(), {tensor.size(0), width}};
}

// dlogits = (softmax - one-hot) / B for the tokens of one shard.
template <class T>
void loss_gradient(std::span<const std::uint8_t> targets, const float* scores, float scale, T* dlogits) {
  for (const std::uint8_t target : targets) {
    for (std::int64_t v = 0; v < kBytes; ++v) {
      dlogits[v] = T((scores[v] - (v == target ? 1.0F : 0.0F)) * scale);
    }
    scores += kBytes;
    dlogits += kBytes;
  }
}

}  // namespace

void validate(const TextModelOptions& options) {
  require_positive("layers", options.layers);
  require_positive("context", options.context);
  require_positive("hidden", options.moe.hidden);
  require_positive("inner", options.moe.inner);
  validate(options.moe.router);
  validate(options.moe.capacity);
  if (options.moe.dtype != DType::f32 && options.moe.dtype != DType::bf16) {
    throw Error(ErrorCode::bad_argument, "dtype " + std::string(name(options.moe.dtype)) + " is neither f32 nor bf16");
  }
}

TextModelOptions dense_twin(TextModelOptions options) {
  options.moe.inner = options.moe.inner * options.moe.router.topk + std::exchange(options.moe.shared_inner, 0);
  options.moe.shared_gate = false;
  const RouterOptions& router = options.moe.router;
  options.moe.router = {.experts = 1, .topk = 1, .balance = router.balance, .z = router.z};
  options.moe.weights_on = WeightsOn::output;
  options.moe.capacity = {};  // one expert takes every token or none: there is nothing to even out
  return options;
}

TextModel::TextModel(const Parallel& ranks, const TextModelOptions& options, std::uint64_t seed)
    : options_((validate(options), options)),
      ranks_(ranks),
      embedding_(ranks.data, options.context, options.moe.hidden, options.moe.dtype),
      norms_(static_cast<std::size_t>(options.layers) + 1),
      gains_(DType::f32, {options.layers + 1, hidden()}),
      dgains_and_loss_(DType::f32, {gains_and_loss()}),
      head_(DType::f32, {kBytes, hidden()}),
      dhead_(DType::f32, {kBytes, hidden()}),
      loads_(static_cast<std::size_t>(options.layers * options.moe.router.experts)) {
  if (dtype() == DType::bf16) head_low_ = Array(dtype(), {kBytes, hidden()});
  std::fill_n(gains_.as<float>(), gains_.view().elements(), 1.0F);
  embedding_.initialise(ranks_.data, seed);
  MoeLayerOptions moe = options.moe;
  moe.tensor = ranks_.tensor;
  // A replica's losses are means over its own tokens; their sum over replicas is to be a mean too.
  moe.router.balance /= static_cast<float>(ranks_.replica_count());
  moe.router.z /= static_cast<float>(ranks_.replica_count());
  moe.workspace = make_experts_workspace();  // blocks run one after another
  blocks_.reserve(static_cast<std::size_t>(options.layers));
  for (std::size_t layer = 0; layer < blocks_.capacity(); ++layer) {
    Block& block = blocks_.emplace_back(MoeLayer(ranks_.experts, moe), std::vector<Parameter>{}, MoeRecord{});
    block.moe.initialise(seed, prefix(layer));
    block.dense = block.moe.dense_parameters(prefix(layer));
  }
}

std::vector<Parameter> TextModel::parameters() {
  std::vector<Parameter> all{embedding_.parameter()};
  for (std::size_t layer = 0; layer < blocks_.size(); ++layer) {
    all.insert(all.end(), blocks_[layer].dense.begin(), blocks_[layer].dense.end());
    auto experts = blocks_[layer].moe.expert_parameters(prefix(layer));
    std::move(experts.begin(), experts.end(), std::back_inserter(all));
  }
  all.push_back({.name = "norms",
                 .value = gains_,
                 .gradient = dgains_and_loss_.view().rows(0, gains_and_loss() - 1),
                 .low = {},
                 .decay = false});
  all.push_back(head_parameter());
  return all;
}

void TextModel::gather(const Context& context) { embedding_.gather(context); }

void TextModel::refresh(const Context& context) {
  for (Block& block : blocks_) block.moe.refresh();
  for (const Parameter& parameter : {embedding_.parameter(), head_parameter()}) {
    if (parameter.low.absent()) continue;
    std::transform(parameter.value.as<float>(), parameter.value.as<float>() + parameter.value.elements(),
                   parameter.low.as<bf16>(), [](float value) { return bf16(value); });
  }
  gather(context);
}

Parameter TextModel::head_parameter() { return {.name = "head", .value = head_, .gradient = dhead_, .low = head_low_}; }

float TextModel::train(const Context& context, const Batch& batch, const Sharding& sharding) {
  forward(context, batch, sharding, Pass::training);
  backward(context, batch, sharding);
  count_loads();
  return dgains_and_loss_.as<float>()[gains_and_loss() - 1];
}

void TextModel::evaluate(const Context& context, const Batch& batch, const Sharding& sharding, std::span<double> nats) {
  forward(context, batch, sharding, Pass::inference);
  for (std::int64_t shard = 0; shard < sharding.local_shards(); ++shard) {
    nats[static_cast<std::size_t>(shard)] += nats_of(batch, sharding, shard);
  }
}

void TextModel::forward(const Context& context, const Batch& batch, const Sharding& sharding, Pass pass) {
  const Phase whole(context.trace(), "forward");
  const std::int64_t tokens = sharding.local_tokens();
  for (Norm& norm : norms_) {
    norm.x = norm.x_memory.view(dtype(), {tokens, hidden()});
    norm.y = norm.y_memory.view(dtype(), {tokens, hidden()});
    norm.scale = norm.scale_memory.view(DType::f32, {tokens});
  }
  const auto contexts = std::span(batch.contexts)
                            .subspan(static_cast<std::size_t>(sharding.first_token * options_.context),
                                     static_cast<std::size_t>(tokens * options_.context));
  embedding_.forward(context, contexts, norms_[0].x);
  rms_norm(context, norms_[0].x, norm_to(0));
  for (std::size_t layer = 0; layer < blocks_.size(); ++layer) {
    const std::string name = shown(layer);
    const Phase phase(context.trace(), name);
    Block& block = blocks_[layer];
    const Norm& in = norms_[layer];
    const Tensor out = norms_[layer + 1].x;
    const MoeInputs inputs{.norm = norm_to(layer + 1)};
    if (pass == Pass::training) {
      block.moe.forward(ranks_.experts, in.y, out, in.x, sharding.offsets, block.record, inputs);
    } else {
      block.moe.forward(ranks_.experts, in.y, out, in.x, inputs);
    }
  }
  const Phase phase(context.trace(), "head");
  predict(context);
}

RmsNorm TextModel::norm_to(std::size_t index) const {
  constexpr float kEpsilon = 1e-5F;
  const Norm& norm = norms_[index];
  return {.gain = flat(gain(index)), .epsilon = kEpsilon, .y = norm.y, .scale = norm.scale};
}

void TextModel::predict(const Context& context) {
  const Norm& norm = norms_.back();
  const std::int64_t tokens = norm.y.size(0);
  const std::int64_t offsets[] = {0, tokens};
  logits_ = logits_memory_.view(DType::f32, {tokens, kBytes});
  scores_ = scores_memory_.view(DType::f32, {tokens, kBytes});
  logsumexp_ = logsumexp_memory_.view(DType::f32, {tokens});
  context.kernels().gemm_nt({.groups = {1, offsets},
                             .n = kBytes,
                             .k = hidden(),
                             .rows = {.base = {norm.y.data()}, .dtype = dtype(), .width = hidden()},
                             .w = {head().data(), dtype()},
                             .y = logits_.data()},
                            context.pool());
  context.kernels().softmax_topk({.tokens = tokens,
                                  .experts = kBytes,
                                  .topk = 1,
                                  .logits = logits_.as<float>(),
                                  .scores = scores_.as<float>(),
                                  .logsumexp = logsumexp_.as<float>(),
                                  .ids = chosen_.view(DType::int32, {tokens, 1}).as<std::int32_t>(),
                                  .top = top_.view(DType::f32, {tokens, 1}).as<float>()},
                                 context.pool());
}

double TextModel::nats_of(const Batch& batch, const Sharding& sharding, std::int64_t shard) const {
  const auto s = static_cast<std::size_t>(shard);
  double sum = 0;
  for (std::int64_t t = sharding.offsets[s]; t < sharding.offsets[s + 1]; ++t) {
    const std::int64_t target = batch.targets[static_cast<std::size_t>(sharding.first_token + t)];
    sum +=
        static_cast<double>(logsumexp_.as<float>()[t]) - static_cast<double>(logits_.as<float>()[t * kBytes + target]);
  }
  return sum;
}

void TextModel::backward(const Context& context, const Batch& batch, const Sharding& sharding) {
  const Phase whole(context.trace(), "backward", &backward_ms_);
  const Tensor dx = dx_.view(dtype(), norms_[0].x.shape());
  const Tensor dnormed = head_backward(context, batch, sharding);
  norm_backward(context, blocks_.size(), dnormed, {}, sharding, dx);
  for (std::size_t layer = blocks_.size(); layer-- > 0;) {
    const std::string name = shown(layer);
    const Phase phase(context.trace(), name);
    Block& block = blocks_[layer];
    block.moe.backward(ranks_.experts, block.record, dx, dnormed);
    const std::vector<ConstTensor> by_shard = block.moe.dense_shard_gradients();
    for (std::size_t i = 0; i < by_shard.size(); ++i) {
      all_reduce(context, flat_rows(by_shard[i]), flat(block.dense[i].gradient));
    }
    norm_backward(context, layer, dnormed, dx, sharding, dx);
  }
  all_reduce(context, gain_rows_, dgains_and_loss_);
  sum_expert_gradients();
  embedding_.backward(context, batch.contexts, dx);
}

Tensor TextModel::head_backward(const Context& context, const Batch& batch, const Sharding& sharding) {
  const Phase phase(context.trace(), "head");
  const Norm& norm = norms_.back();
  const std::int64_t tokens = sharding.local_tokens(), shards = sharding.local_shards();
  const float scale = 1.0F / static_cast<float>(sharding.tokens);
  const Tensor dlogits = dlogits_.view(dtype(), {tokens, kBytes});
  gain_rows_ = gain_rows_memory_.view(DType::f32, {shards, gains_and_loss()});
  context.pool().run(shards, [&](std::int64_t shard, int) {
    const std::int64_t first = sharding.offsets[static_cast<std::size_t>(shard)];
    const std::int64_t count = sharding.offsets[static_cast<std::size_t>(shard) + 1] - first;
    const std::span targets(batch.targets.data() + sharding.first_token + first, static_cast<std::size_t>(count));
    const float* scores = scores_.as<float>() + first * kBytes;
    if (dtype() == DType::bf16) {
      loss_gradient(targets, scores, scale, dlogits.as<bf16>() + first * kBytes);
    } else {
      loss_gradient(targets, scores, scale, dlogits.as<float>() + first * kBytes);
    }
    gain_rows_.as<float>()[(shard + 1) * gains_and_loss() - 1] =
        static_cast<float>(nats_of(batch, sharding, shard) / static_cast<double>(sharding.tokens));
  });

  const Tensor rows = head_rows_.view(DType::f32, {shards, kBytes * hidden()});
  context.kernels().gemm_tn({.groups = {static_cast<int>(shards), sharding.offsets.data()},
                             .n = kBytes,
                             .k = hidden(),
                             .dy = dlogits.data(),
                             .rows = {.base = {norm.y.data()}, .dtype = dtype(), .width = hidden()},
                             .dw = rows.as<float>()},
                            context.pool());
  all_reduce(context, rows, flat(dhead_));

  const Tensor dnormed = dnormed_.view(dtype(), norm.y.shape());
  const std::int64_t offsets[] = {0, tokens};
  context.kernels().gemm_nn({.groups = {1, offsets},
                             .n = kBytes,
                             .k = hidden(),
                             .dy = dlogits.data(),
                             .w = {head().data(), dtype()},
                             .dx = dnormed.data(),
                             .dx_dtype = dtype()},
                            context.pool());
  return dnormed;
}

void TextModel::norm_backward(const Context& context, std::size_t index, ConstTensor dy, ConstTensor residual,
                              const Sharding& sharding, Tensor dx) {
  const Norm& norm = norms_[index];
  float* dgain = gain_rows_.as<float>() + static_cast<std::int64_t>(index) * hidden();
  rms_norm_backward(context, norm.x, gain(index), norm.scale, dy, residual, sharding.offsets, dx, dgain,
                    gains_and_loss());
}

/// The gradients of experts that other ranks hold too.
void TextModel::sum_expert_gradients() {
  if (!ranks_.replicas) return;
  const Context replicas = ranks_.data.on(ranks_.replicas);
  for (std::size_t layer = 0; layer < blocks_.size(); ++layer) {
    for (const Parameter& p : blocks_[layer].moe.expert_parameters(prefix(layer))) {
      const Tensor sum = replica_sum_.view(DType::f32, {p.gradient.elements()});
      all_reduce(replicas, ConstTensor(p.gradient.data(), DType::f32, {1, sum.elements()}), sum);
      std::copy_n(sum.as<float>(), sum.elements(), p.gradient.as<float>());
    }
  }
}

/// The sum of each replica's counts.
std::vector<std::int64_t> TextModel::over_replicas(std::span<const std::int64_t> counts) const {
  std::vector<std::int64_t> sum(counts.begin(), counts.end());
  if (!ranks_.replicas || counts.empty()) return sum;
  const auto count = static_cast<std::int64_t>(counts.size());
  const Array all(DType::int64, {ranks_.replicas.size(), count});
  all_gather(ranks_.data.on(ranks_.replicas), ConstTensor(counts.data(), {1, count}), all);
  std::fill(sum.begin(), sum.end(), 0);
  for (std::int64_t i = 0; i < all.view().elements(); ++i) {
    sum[static_cast<std::size_t>(i % count)] += all.as<std::int64_t>()[i];
  }
  return sum;
}

void TextModel::follow_loads(float rate) {
  const auto experts = static_cast<std::size_t>(options_.moe.router.experts);
  if (!options_.moe.router.selection_bias) return;
  for (std::size_t layer = 0; layer < blocks_.size(); ++layer) {
    // What the router wanted, dropped or not.
    const std::vector<std::int64_t> chosen = over_replicas(blocks_[layer].record.capacity.chosen);
    const auto counts = chosen.empty() ? loads().subspan(layer * experts, experts) : std::span(chosen);
    update_selection_bias(selection_bias(layer), counts, rate);
  }
}

void TextModel::count_loads() {
  const auto experts = static_cast<std::size_t>(options_.moe.router.experts);
  dropped_ = 0;
  for (std::size_t layer = 0; layer < blocks_.size(); ++layer) {
    const MoeRecord& record = blocks_[layer].record;
    const auto totals = record.plan.expert_totals();
    std::copy(totals.begin(), totals.end(), loads_.begin() + static_cast<std::ptrdiff_t>(layer * experts));
    for (const std::int64_t slots : record.capacity.dropped) dropped_ += slots;
  }
  loads_ = over_replicas(loads_);
  dropped_ = over_replicas({&dropped_, 1}).front();
}

PhaseTimes TextModel::take_times() {
  PhaseTimes sum;
  for (Block& block : blocks_) sum += block.moe.take_times();
  sum.backward = std::exchange(backward_ms_, 0.0);
  return sum;
}

}  // namespace expar
