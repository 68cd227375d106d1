// The formulas of the router's losses, each with its gradient, in double.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <expar/router.h>

namespace expar {

/// A loss and its gradient by what it was computed from.
struct LossTerm {
  double value = 0;
  std::vector<double> gradient;  // [E]
};

/// Var(sums) / E^2, the variance being unbiased (torch.var), 0 for one expert.
LossTerm variance_loss(std::span<const float> sums);

/// Var(sums) / (mean(sums)^2 + 1e-10), likewise.
LossTerm variation_loss(std::span<const float> sums);

/// E * sum_i (c_i / (T_s K)) mean_t score[t, i] over tokens [begin, end), of which T_s are no padding: the gradient is
/// by a score of one of them. Nothing where T_s is 0.
LossTerm sequence_loss(const Routing& routing, std::int64_t begin, std::int64_t end);

/// sums [E] += the probability that noise of this deviation would lift each score of the token to its last chosen one.
void add_loads(const Routing& routing, std::int64_t token, double deviation, float* sums);
/// scores [E] += the gradient of the token's loads, times `by_load` [E], by its scores.
void add_load_gradient(const Routing& routing, std::int64_t token, double deviation, std::span<const double> by_load,
                       float* scores);

}  // namespace expar
