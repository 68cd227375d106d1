// The gradient of the weights and of the losses by the logits.
#include <expar/router.h>

#include <algorithm>
#include <cmath>

#include "src/route/check.h"
#include "src/util/processor.h"
#include "src/util/ranges.h"

namespace expar {
namespace {

/// d score / d logit, from the score.
double slope(Score score, double s) {
  if (score == Score::sigmoid) return s * (1.0 - s);
  return s > 0 ? -std::expm1(-s * s) / (2.0 * s) : 0.0;  // s^2 = softplus(z), whose slope is 1 - exp(-softplus(z))
}

/// What the backward pass of every token needs.
struct Backward {
  const RouterOptions& options;
  const Routing& routing;
  float dlogsumexp = 0.0F;
  std::int64_t slots = slots_of(options);

  /// `dscores` : [E] gradient of the losses by the token's loss scores, or null
  void token(std::int64_t t, const float* dweights, const float* dscores, float* dlogits) const;

 private:
  void through_softmax(std::int64_t t, const float* dweights, const float* dscores, float* dlogits) const;
  void through_each(std::int64_t t, const float* dweights, const float* dscores, float* dlogits) const;

  const float* row(const Tensor& tensor, std::int64_t t) const { return tensor.as<float>() + t * tensor.size(1); }
};

/// The gradient by a chosen score: w_k = c s_k / S, so ds_k = (c dw_k - sum_j w_j dw_j) / S; without renormalisation
/// w_k = c s_k.
class ByChosen {
 public:
  ByChosen(const RouterOptions& options, const float* top, const float* weights, const float* dweights)
      : scaling_(options.scaling), dweights_(dweights) {
    if (!options.renormalise) return;
    const std::int64_t slots = slots_of(options);
    float sum = 0.0F;
    for (std::int64_t k = 0; k < slots; ++k) sum += top[k];
    for (std::int64_t k = 0; k < slots; ++k) mean_ += weights[k] * dweights[k];
    inverse_ = 1.0F / (sum + kTiny);
  }
  float operator[](std::int64_t k) const { return (scaling_ * dweights_[k] - mean_) * inverse_; }

 private:
  float scaling_, mean_ = 0.0F, inverse_ = 1.0F;
  const float* dweights_;
};

void Backward::token(std::int64_t t, const float* dweights, const float* dscores, float* dlogits) const {
  if (is_padding(routing.mask, t)) {
    std::fill_n(dlogits, options.experts, 0.0F);
  } else if (options.score == Score::softmax) {
    through_softmax(t, dweights, dscores, dlogits);
  } else {
    through_each(t, dweights, dscores, dlogits);
  }
}

void Backward::through_softmax(std::int64_t t, const float* dweights, const float* dscores, float* dlogits) const {
  const float* scores = row(routing.scores, t);
  const std::int32_t* ids = routing.ids.as<std::int32_t>() + t * slots;
  const float* top = row(routing.top, t);
  const ByChosen by_chosen(options, top, row(routing.weights, t), dweights);
  // softmax: dz_e = s_e (ds_e - sum_j s_j ds_j); logsumexp: dz_e = s_e.
  float dot = 0.0F;
  for (std::int64_t k = 0; k < slots; ++k) dot += top[k] * by_chosen[k];
  for (std::int64_t e = 0; dscores != nullptr && e < options.experts; ++e) dot += scores[e] * dscores[e];
  const float common = dlogsumexp * routing.logsumexp.as<float>()[t] - dot;
  for (std::int64_t e = 0; e < options.experts; ++e) {
    dlogits[e] = scores[e] * (dscores == nullptr ? common : dscores[e] + common);
  }
  for (std::int64_t k = 0; k < slots; ++k) {
    if (ids[k] >= 0) dlogits[ids[k]] += top[k] * by_chosen[k];
  }
}

void Backward::through_each(std::int64_t t, const float* dweights, const float* dscores, float* dlogits) const {
  const float* scores = row(routing.scores, t);
  const float* loss_scores = row(routing.loss_scores, t);
  const float* probabilities = row(routing.probabilities, t);
  const std::int32_t* ids = routing.ids.as<std::int32_t>() + t * slots;
  const ByChosen by_chosen(options, row(routing.top, t), row(routing.weights, t), dweights);
  std::fill_n(dlogits, options.experts, 0.0F);
  if (dscores != nullptr) {
    // q_e = s_e / S: ds_e = (dq_e - sum_j q_j dq_j) / S.
    float sum = 0.0F;
    float dot = 0.0F;
    for (std::int64_t e = 0; e < options.experts; ++e) sum += scores[e];
    for (std::int64_t e = 0; e < options.experts; ++e) dot += loss_scores[e] * dscores[e];
    const float inverse = 1.0F / (sum + kTiny);
    for (std::int64_t e = 0; e < options.experts; ++e) dlogits[e] = (dscores[e] - dot) * inverse;
  }
  for (std::int64_t k = 0; k < slots; ++k) {
    if (ids[k] >= 0) dlogits[ids[k]] += by_chosen[k];
  }
  const float common = dlogsumexp * routing.logsumexp.as<float>()[t];
  for (std::int64_t e = 0; e < options.experts; ++e) {
    const double by_score = double{dlogits[e]} * slope(options.score, double{scores[e]});
    dlogits[e] = static_cast<float>(by_score) + common * probabilities[e];
  }
}

void check_segments(const RouterLosses& losses, std::int64_t tokens, std::int64_t experts) {
  const std::vector<std::int64_t>& segments = losses.segments;
  const std::size_t rows = segments.empty() ? 0 : segments.size() - 1;
  if (losses.dscores.size() != rows * static_cast<std::size_t>(experts)) {
    refuse("dscores of the losses has " + std::to_string(losses.dscores.size()) + " entries for " +
           std::to_string(rows) + " segments of " + std::to_string(experts) + " experts");
  }
  if (!segments.empty()) require_ascending("segments of the losses", segments, tokens);
}

}  // namespace

void route_backward(const Context& context, const RouterOptions& options, const Routing& routing,
                    const RouterLosses& losses, ConstTensor dweights, Tensor dlogits) {
  validate(options);
  require(options, routing);
  require("dweights", dweights, DType::f32, routing.weights.shape());
  require("dlogits", dlogits, DType::f32, routing.scores.shape());
  const std::int64_t tokens = routing.scores.size(0);
  check_segments(losses, tokens, options.experts);

  const FloatMode mode;
  const Backward backward{options, routing, losses.dlogsumexp};
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
      backward.token(t, from + t * backward.slots, dscores, to + t * options.experts);
    }
  });
}

}  // namespace expar
