// Softmax, top-k and renormalisation, forward and backward; the losses over the global batch are in losses.cpp.
#include <expar/router.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "src/route/check.h"
#include "src/util/processor.h"
#include "src/util/ranges.h"

namespace expar {
namespace {

constexpr std::int64_t kGrain = 256;  // tokens per task: some ten microseconds at 64 experts

void check_finite(const ConstTensor& logits) {
  const std::int64_t experts = logits.size(1);
  const float* row = logits.as<float>();
  for (std::int64_t t = 0; t < logits.size(0); ++t, row += experts) {
    bool finite = true;
    for (std::int64_t e = 0; e < experts; ++e) {
      finite &= (std::bit_cast<std::uint32_t>(row[e]) & 0x7f800000u) != 0x7f800000u;
    }
    for (std::int64_t e = 0; !finite && e < experts; ++e) {
      if (std::isfinite(row[e])) continue;
      refuse("logits[" + std::to_string(t) + "," + std::to_string(e) + "] is " +
             (std::isnan(row[e]) ? "nan"
              : row[e] > 0       ? "inf"
                                 : "-inf"));
    }
  }
}

/// Cuts tensors out of the routing's memory, each on cache lines of its own.
class Cut {
 public:
  static constexpr std::int64_t kLine = 16;  // f32 or int32 in a cache line
  static std::int64_t room(const Shape& shape) { return (shape.elements() + kLine - 1) / kLine * kLine; }

  explicit Cut(const Tensor& memory) : next_(memory.as<float>()) {}
  Tensor take(DType dtype, const Shape& shape) {
    const Tensor taken(next_, dtype, shape);
    next_ += room(shape);
    return taken;
  }

 private:
  float* next_;
};

void lay_out(std::int64_t tokens, const RouterOptions& options, Routing& routing) {
  const Shape all{tokens, options.experts};
  const Shape chosen{tokens, options.topk};
  Cut cut(routing.memory.view(DType::f32, {Cut::room(all) + 3 * Cut::room(chosen) + Cut::room({tokens})}));
  routing.ids = cut.take(DType::int32, chosen);
  routing.weights = cut.take(DType::f32, chosen);
  routing.scores = cut.take(DType::f32, all);
  routing.top = cut.take(DType::f32, chosen);
  routing.logsumexp = cut.take(DType::f32, {tokens});
}

float sum_of(const float* values, std::int64_t count) {
  float sum = 0.0F;
  for (std::int64_t k = 0; k < count; ++k) sum += values[k];
  return sum;
}

/// What the backward pass of every token needs.
struct Backward {
  std::int64_t experts = 0, topk = 0;
  bool renormalise = false;
  float dlogsumexp = 0.0F;

  /// `dscores` : [E] gradient of the losses by the token's scores, or null
  void token(const Routing& routing, std::int64_t t, const float* dweights, const float* dscores, float* dlogits) const;
};

void Backward::token(const Routing& routing, std::int64_t t, const float* dweights, const float* dscores,
                     float* dlogits) const {
  const float* scores = routing.scores.as<float>() + t * experts;
  const std::int32_t* ids = routing.ids.as<std::int32_t>() + t * topk;
  const float* weights = routing.weights.as<float>() + t * topk;
  const float* top = routing.top.as<float>() + t * topk;

  // w_k = s_k / S, so ds_k = (dw_k - sum_j w_j dw_j) / S; without renormalisation w_k = s_k.
  float mean = 0.0F;
  float inverse = 1.0F;
  if (renormalise) {
    for (std::int64_t k = 0; k < topk; ++k) mean += weights[k] * dweights[k];
    inverse = 1.0F / sum_of(top, topk);
  }
  // softmax: dz_e = s_e (ds_e - sum_j s_j ds_j); logsumexp: dz_e = s_e.
  float dot = 0.0F;
  for (std::int64_t k = 0; k < topk; ++k) dot += top[k] * ((dweights[k] - mean) * inverse);
  for (std::int64_t e = 0; dscores != nullptr && e < experts; ++e) dot += scores[e] * dscores[e];
  const float common = dlogsumexp * routing.logsumexp.as<float>()[t] - dot;
  for (std::int64_t e = 0; e < experts; ++e) {
    dlogits[e] = scores[e] * (dscores == nullptr ? common : dscores[e] + common);
  }
  for (std::int64_t k = 0; k < topk; ++k) {
    if (ids[k] >= 0) dlogits[ids[k]] += top[k] * ((dweights[k] - mean) * inverse);
  }
}

void check_segments(const RouterLosses& losses, std::int64_t tokens, std::int64_t experts) {
  const std::vector<std::int64_t>& segments = losses.segments;
  const std::size_t rows = segments.empty() ? 0 : segments.size() - 1;
  if (losses.dscores.size() != rows * static_cast<std::size_t>(experts)) {
    refuse("dscores of the losses has " + std::to_string(losses.dscores.size()) + " entries for " +
           std::to_string(rows) + " segments of " + std::to_string(experts) + " experts");
  }
  if (segments.empty()) return;
  if (segments.front() != 0 || segments.back() != tokens || !std::is_sorted(segments.begin(), segments.end())) {
    refuse("segments of the losses go from " + std::to_string(segments.front()) + " to " +
           std::to_string(segments.back()) + ", should ascend from 0 to the " + std::to_string(tokens) +
           " tokens of this rank");
  }
}

}  // namespace

void validate(const RouterOptions& options) {
  if (options.experts < 1) refuse("experts is " + std::to_string(options.experts) + ", must be at least 1");
  if (options.topk < 1) refuse("topk is " + std::to_string(options.topk) + ", must be at least 1");
  if (options.topk > options.experts) {
    refuse("topk " + std::to_string(options.topk) + " is above experts " + std::to_string(options.experts));
  }
  const auto coefficient = [](const char* what, float value) {
    if (!(std::isfinite(value) && value >= 0.0F)) {
      refuse(std::string(what) + " is " + std::to_string(value) + ", must be a number from 0");
    }
  };
  coefficient("balance", options.balance);
  coefficient("z", options.z);
}

void route(const Context& context, const RouterOptions& options, ConstTensor logits, Routing& routing) {
  validate(options);
  const std::int64_t tokens = logits.shape().rank() == 2 ? logits.size(0) : 0;
  require("logits", logits, {tokens, options.experts});
  if (options.nan == NanPolicy::error) check_finite(logits);
  lay_out(tokens, options, routing);
  if (tokens == 0) return;

  SoftmaxTopK call;
  call.tokens = tokens;
  call.experts = options.experts;
  call.topk = options.topk;
  call.logits = logits.as<float>();
  call.scores = routing.scores.as<float>();
  call.logsumexp = routing.logsumexp.as<float>();
  call.ids = routing.ids.as<std::int32_t>();
  call.top = routing.top.as<float>();
  context.kernels().softmax_topk(call, context.pool());

  for_ranges(context.pool(), tokens, kGrain, [&](std::int64_t begin, std::int64_t end) {
    const float* top = routing.top.as<float>() + begin * options.topk;
    float* weights = routing.weights.as<float>() + begin * options.topk;
    for (std::int64_t t = begin; t < end; ++t, top += options.topk, weights += options.topk) {
      const float sum = options.renormalise ? sum_of(top, options.topk) : 1.0F;
      for (std::int64_t k = 0; k < options.topk; ++k) weights[k] = top[k] / sum;
    }
  });
}

void route_backward(const Context& context, const RouterOptions& options, const Routing& routing,
                    const RouterLosses& losses, ConstTensor dweights, Tensor dlogits) {
  validate(options);
  require(options, routing);
  require("dweights", dweights, routing.weights.shape());
  require("dlogits", dlogits, routing.scores.shape());
  const std::int64_t tokens = routing.scores.size(0);
  check_segments(losses, tokens, options.experts);

  const FloatMode mode;
  const Backward backward{options.experts, options.topk, options.renormalise, losses.dlogsumexp};
  const float* from = dweights.as<float>();
  float* to = dlogits.as<float>();
  for_ranges(context.pool(), tokens, kGrain, [&](std::int64_t begin, std::int64_t end) {
    const auto bounds = losses.segments.begin();
    std::int64_t segment = std::upper_bound(bounds, losses.segments.end(), begin) - bounds - 1;
    for (std::int64_t t = begin; t < end; ++t) {
      const float* dscores = nullptr;
      if (!losses.dscores.empty()) {
        while (losses.segments[static_cast<std::size_t>(segment) + 1] <= t) ++segment;
        dscores = losses.dscores.data() + segment * options.experts;
      }
      backward.token(routing, t, from + t * options.topk, dscores, to + t * options.experts);
    }
  });
}

}  // namespace expar
