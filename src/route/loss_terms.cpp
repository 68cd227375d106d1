// The formulas of the router's losses, each with its gradient, in double.
#include "src/route/loss_terms.h"

#include <cmath>
#include <numbers>
#include <numeric>

#include "src/route/check.h"
#include "src/util/check.h"

namespace expar {
namespace {

constexpr double kTinySquare = 1e-10;  // beside the squared mean, as Tutel does

struct Spread {
  double mean = 0, variance = 0;  // unbiased
};
Spread spread_of(std::span<const float> sums) {
  const auto count = static_cast<double>(sums.size());
  Spread spread;
  for (const float sum : sums) spread.mean += sum / count;
  if (sums.size() < 2) return spread;
  for (const float sum : sums) spread.variance += (sum - spread.mean) * (sum - spread.mean) / (count - 1);
  return spread;
}
/// d variance / d sum
double slope(const Spread& spread, float sum, std::size_t count) {
  return count < 2 ? 0.0 : 2 * (sum - spread.mean) / static_cast<double>(count - 1);
}

/// The expert of the last slot that has one; its score is what the others of the token would have to reach. -1: none.
std::int64_t last_chosen(const Routing& routing, std::int64_t token) {
  const std::int64_t topk = routing.ids.size(1);
  const std::int32_t* ids = routing.ids.as<std::int32_t>() + token * topk;
  for (std::int64_t k = topk; k-- > 0;)
    if (ids[k] >= 0) return ids[k];
  return -1;
}

}  // namespace

LossTerm variance_loss(std::span<const float> sums) {
  const Spread spread = spread_of(sums);
  const auto squared = static_cast<double>(sums.size() * sums.size());
  LossTerm term{spread.variance / squared, {}};
  for (const float sum : sums) term.gradient.push_back(slope(spread, sum, sums.size()) / squared);
  return term;
}

LossTerm variation_loss(std::span<const float> sums) {
  const Spread spread = spread_of(sums);
  const double square = spread.mean * spread.mean + kTinySquare;
  LossTerm term{spread.variance / square, {}};
  const double by_mean = -spread.variance / (square * square) * 2 * spread.mean / static_cast<double>(sums.size());
  for (const float sum : sums) term.gradient.push_back(slope(spread, sum, sums.size()) / square + by_mean);
  return term;
}

LossTerm sequence_loss(const Routing& routing, std::int64_t begin, std::int64_t end) {
  const std::int64_t experts = routing.loss_scores.size(1);
  const std::int64_t topk = routing.ids.size(1);
  std::vector<double> counts(at(experts)), means(at(experts));
  double tokens = 0;
  for (std::int64_t t = begin; t < end; ++t) {
    if (is_padding(routing.mask, t)) continue;
    ++tokens;
    for (std::int64_t e = 0; e < experts; ++e) means[at(e)] += routing.loss_scores.as<float>()[t * experts + e];
    for (std::int64_t k = 0; k < topk; ++k) {
      const std::int32_t id = routing.ids.as<std::int32_t>()[t * topk + k];
      if (id >= 0) ++counts[at(id)];
    }
  }
  if (tokens == 0) return {};
  LossTerm term;
  for (std::int64_t e = 0; e < experts; ++e) {
    const double fraction = counts[at(e)] * static_cast<double>(experts) / (static_cast<double>(topk) * tokens);
    term.value += fraction * means[at(e)] / tokens;
    term.gradient.push_back(fraction / tokens);
  }
  return term;
}

void add_loads(const Routing& routing, std::int64_t token, double deviation, float* sums) {
  const std::int64_t last = last_chosen(routing, token);
  if (last < 0) return;
  const std::int64_t experts = routing.loss_scores.size(1);
  const float* scores = routing.loss_scores.as<float>() + token * experts;
  for (std::int64_t e = 0; e < experts; ++e) {
    const double distance = (double{scores[e]} - scores[last]) / deviation;
    sums[e] += static_cast<float>(0.5 * std::erfc(-distance / std::numbers::sqrt2));
  }
}

void add_load_gradient(const Routing& routing, std::int64_t token, double deviation, std::span<const double> by_load,
                       float* gradient) {
  const std::int64_t last = last_chosen(routing, token);
  if (last < 0) return;
  const float* scores = routing.loss_scores.as<float>() + token * static_cast<std::int64_t>(by_load.size());
  double by_last = 0;  // the last chosen score moves against all others
  for (std::size_t e = 0; e < by_load.size(); ++e) {
    const double distance = (double{scores[e]} - scores[last]) / deviation;
    const double density = std::exp(-0.5 * distance * distance) * std::numbers::inv_sqrtpi / std::numbers::sqrt2;
    const double by_score = by_load[e] * density / deviation;
    gradient[e] += static_cast<float>(by_score);
    by_last += by_score;
  }
  gradient[last] -= static_cast<float>(by_last);
}

}  // namespace expar
