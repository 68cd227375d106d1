// The layer's parameters: drawing them by name, copying them to bf16, packing them.
#include "src/layer/parameters.h"

#include <cmath>
#include <numeric>
#include <string>
#include <utility>

#include <expar/random.h>

#include "src/layer/convert.h"
#include "src/util/ranges.h"

namespace expar {
namespace {

constexpr std::int64_t kGrain = 4096;  // numbers per task: a tenth of a millisecond

std::string join(std::string_view prefix, const std::string& name) {
  return prefix.empty() ? name : std::string(prefix) + "." + name;
}

/// Normal numbers of deviation 1 / sqrt(inputs), where `inputs` is the innermost extent.
void draw(const Tensor& values, std::uint64_t seed, const std::string& stream, Pool& pool) {
  const Random random(seed, stream);
  const auto deviation =
      static_cast<float>(1.0 / std::sqrt(static_cast<double>(values.size(values.shape().rank() - 1))));
  float* to = values.as<float>();
  for_ranges(pool, values.elements(), kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) to[i] = deviation * random.normal(static_cast<std::uint64_t>(i));
  });
}

/// K different experts for each token id, all equally likely.
void draw_token_table(const Tensor& table, std::int64_t experts, std::uint64_t seed, const std::string& stream) {
  const Random random(seed, stream);
  std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
  std::uint64_t drawn = 0;
  for (std::int64_t token = 0; token < table.size(0); ++token) {
    std::iota(order.begin(), order.end(), 0);
    for (std::int64_t k = 0; k < table.size(1); ++k) {
      const auto left = static_cast<std::uint64_t>(experts - k);
      std::swap(order[static_cast<std::size_t>(k)],
                order[static_cast<std::size_t>(k) + static_cast<std::size_t>(random.bits(drawn++) % left)]);
      table.as<std::int32_t>()[token * table.size(1) + k] = order[static_cast<std::size_t>(k)];
    }
  }
}

void zero(const Tensor& values) {
  for (std::int64_t i = 0; i < values.elements(); ++i) values.as<float>()[i] = 0.0F;
}

}  // namespace

LayerParameters::LayerParameters(const MoeLayerOptions& options, ExpertRange range)
    : first_(range.first), dtype_(options.dtype), bias_(options.bias) {
  const std::int64_t wide = gated(options.activation) ? 2 * options.inner : options.inner;
  const auto matrix = [&](Matrix& m, const Shape& shape) {
    m.value = Array(DType::f32, shape);
    if (dtype_ == DType::bf16) m.low = Array(DType::bf16, shape);
  };
  router_.value = Array(DType::f32, {options.router.experts, options.hidden});
  if (options.router.bias) router_bias_.value = Array(DType::f32, {options.router.experts});
  if (options.router.selection_bias) selection_bias_ = Array(DType::f32, {options.router.experts});
  if (options.router.choice == Choice::token_table) {
    token_table_ = Array(DType::int32, {options.router.vocabulary, options.router.topk});
  }
  matrix(up_, {range.count, wide, options.hidden});
  matrix(down_, {range.count, options.hidden, options.inner});
  if (bias_) {
    up_bias_.value = Array(DType::f32, {range.count, wide});
    down_bias_.value = Array(DType::f32, {range.count, options.hidden});
  }
  if (options.shared_inner == 0) return;
  matrix(shared_up_, {1, options.shared_shape().up_rows(), options.hidden});
  matrix(shared_down_, {1, options.hidden, options.shared_inner});
  if (options.shared_gate) shared_gate_.value = Array(DType::f32, {options.hidden});
}

void LayerParameters::initialise(std::uint64_t seed, std::string_view prefix, Pool& pool) {
  draw(router_.value, seed, join(prefix, "router.weight"), pool);
  for (std::int64_t e = 0; e < up_.value.view().size(0); ++e) {
    const std::string expert = join(prefix, "experts." + std::to_string(first_ + e));
    const auto one = [&](const Matrix& m, const char* what) {
      const Tensor all = m.value.view();
      draw(Tensor(all.rows(e, 1).data(), DType::f32, {all.size(1), all.size(2)}), seed, expert + what, pool);
    };
    one(up_, ".up");
    one(down_, ".down");
  }
  if (bias_) {
    zero(up_bias_.value);
    zero(down_bias_.value);
  }
  if (router_bias_.value) zero(router_bias_.value);
  if (selection_bias_) zero(selection_bias_);
  if (token_table_)
    draw_token_table(token_table_, router_.value.view().size(0), seed, join(prefix, "router.token_table"));
  if (shared_up_.value) draw(shared_up_.value, seed, join(prefix, "shared.up"), pool);
  if (shared_down_.value) draw(shared_down_.value, seed, join(prefix, "shared.down"), pool);
  if (shared_gate_.value) draw(shared_gate_.value, seed, join(prefix, "shared.gate"), pool);
  refresh(pool);
}

void LayerParameters::refresh(Pool& pool) {
  for (const Matrix* m : {&up_, &down_, &shared_up_, &shared_down_}) {
    if (m->low) to_bf16(m->value, m->low, pool);
  }
  packed_by_ = nullptr;
  watched_ = false;
}

ExpertWeights LayerParameters::plain() const {
  ExpertWeights weights;
  weights.up = {read(up_).view().data(), dtype_, false};
  weights.down = {read(down_).view().data(), dtype_, false};
  if (bias_) {
    weights.up_bias = up_bias_.value;
    weights.down_bias = down_bias_.value;
  }
  return weights;
}

ExpertWeights LayerParameters::for_inference(const Kernels& kernels, Pool& pool) {
  ExpertWeights weights = plain();
  if (up_.value.view().size(0) == 0 || !packs(kernels, pool)) return weights;
  weights.up = {up_.packed.view().data(), dtype_, true};
  weights.down = {down_.packed.view().data(), dtype_, true};
  return weights;
}

SharedWeights LayerParameters::shared() const {
  SharedWeights weights;
  if (!shared_up_.value) return weights;
  weights.expert.up = {read(shared_up_).view().data(), dtype_, false};
  weights.expert.down = {read(shared_down_).view().data(), dtype_, false};
  if (shared_gate_.value) weights.gate = shared_gate_.value;
  return weights;
}

SharedWeights LayerParameters::shared_for_inference(const Kernels& kernels, Pool& pool) {
  SharedWeights weights = shared();
  if (!shared_up_.value || !packs(kernels, pool)) return weights;
  weights.expert.up = {shared_up_.packed.view().data(), dtype_, true};
  weights.expert.down = {shared_down_.packed.view().data(), dtype_, true};
  return weights;
}

/// Whether packed copies may be read; makes them where they are stale.
bool LayerParameters::packs(const Kernels& kernels, Pool& pool) {
  if (watched_) return false;
  if (packed_by_ == kernels.pack) return true;
  packed_by_ = nullptr;
  for (Matrix* m : {&up_, &down_, &shared_up_, &shared_down_}) {
    if (m->value && m->value.view().size(0) > 0) pack(*m, kernels, pool);
  }
  packed_by_ = kernels.pack;
  return true;
}

void LayerParameters::pack(Matrix& matrix, const Kernels& kernels, Pool& pool) const {
  const Tensor all = read(matrix).view();
  const std::int64_t bytes = all.size(0) * kernels.packed_bytes(dtype_, all.size(1), all.size(2));
  if (!matrix.packed || matrix.packed.view().elements() != bytes) matrix.packed = Array(DType::int8, {bytes});
  kernels.pack(dtype_, static_cast<int>(all.size(0)), all.size(1), all.size(2), all.data(), matrix.packed.view().data(),
               pool);
}

ExpertGradients LayerParameters::gradients() {
  // Inference never asks for them.
  for (Trained* t : {static_cast<Trained*>(&up_), static_cast<Trained*>(&down_), &up_bias_, &down_bias_}) {
    if (t->value && !t->gradient) t->gradient = Array(DType::f32, t->value.view().shape());
  }
  ExpertGradients gradients;
  gradients.up = up_.gradient;
  gradients.down = down_.gradient;
  if (bias_) {
    gradients.up_bias = up_bias_.gradient;
    gradients.down_bias = down_bias_.gradient;
  }
  return gradients;
}

std::vector<Parameter> LayerParameters::experts(std::string_view prefix) {
  watched_ = true;
  gradients();
  const auto parameter = [&](const char* what, const Trained& t, const Array* low, bool decay) {
    Parameter p{join(prefix, what), t.value, t.gradient, {}, decay};
    if (low != nullptr && *low) p.low = *low;
    return p;
  };
  std::vector<Parameter> all{parameter("experts.up", up_, &up_.low, true),
                             parameter("experts.down", down_, &down_.low, true)};
  if (bias_) {
    all.push_back(parameter("experts.up_bias", up_bias_, nullptr, false));
    all.push_back(parameter("experts.down_bias", down_bias_, nullptr, false));
  }
  return all;
}

std::vector<Parameter> LayerParameters::shared(std::string_view prefix) {
  watched_ = true;
  std::vector<Parameter> all;
  const auto add = [&](const char* what, Trained& t, const Array* low) {
    if (!t.value) return;
    if (!t.gradient) t.gradient = Array(DType::f32, t.value.view().shape());
    const auto plain = [](const Tensor& tensor) {
      return tensor.shape().rank() < 3 ? tensor
                                       : Tensor(tensor.data(), tensor.dtype(), {tensor.size(1), tensor.size(2)});
    };
    Parameter p{join(prefix, what), plain(t.value), plain(t.gradient), {}, true};
    if (low != nullptr && *low) p.low = plain(*low);
    all.push_back(p);
  };
  add("shared.up", shared_up_, &shared_up_.low);
  add("shared.down", shared_down_, &shared_down_.low);
  add("shared.gate", shared_gate_, nullptr);
  return all;
}

Parameter LayerParameters::router(std::string_view prefix) {
  if (!router_.gradient) router_.gradient = Array(DType::f32, router_.value.view().shape());
  return {join(prefix, "router.weight"), router_.value, router_.gradient, {}, true};
}

Parameter LayerParameters::router_bias(std::string_view prefix) {
  if (!router_bias_.gradient) router_bias_.gradient = Array(DType::f32, router_bias_.value.view().shape());
  return {join(prefix, "router.bias"), router_bias_.value, router_bias_.gradient, {}, false};
}

}  // namespace expar
