// Balancing without a loss: a bias on the choice that follows the loads (Wang et al. 2024, arXiv 2408.15664).
#include <cmath>
#include <numeric>
#include <string>

#include <expar/router.h>

#include "src/route/check.h"

namespace expar {

void update_selection_bias(Tensor bias, std::span<const std::int64_t> counts, float rate, BiasRule rule) {
  const auto experts = static_cast<std::int64_t>(counts.size());
  require("selection bias", bias, DType::f32, {experts});
  if (!(std::isfinite(rate) && rate >= 0.0F)) refuse("rate is " + std::to_string(rate) + ", must be a number from 0");
  // mean(c) > c_i, in whole numbers.
  const std::int64_t total = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  const auto step = [&](std::int64_t count) {
    const std::int64_t wants = total - count * experts;
    return wants > 0 ? 1.0 : wants < 0 ? -1.0 : 0.0;
  };
  double mean = 0;
  if (rule == BiasRule::centred) {
    for (const std::int64_t count : counts) mean += step(count) / static_cast<double>(experts);
  }
  float* b = bias.as<float>();
  for (const std::int64_t count : counts) {
    *b = static_cast<float>(double{*b} + double{rate} * (step(count) - mean));
    ++b;
  }
}

}  // namespace expar
