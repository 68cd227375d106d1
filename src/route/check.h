// What the files of the router share: what they refuse, and the numbers of their formulas.
#pragma once

#include <string>

#include <expar/error.h>
#include <expar/router.h>

#include "src/util/check.h"

namespace expar {

inline constexpr std::int64_t kGrain = 256;  // tokens per task: some ten microseconds at 64 experts
inline constexpr float kTiny = 1e-20F;       // beside the sums that scores are divided by, as DeepSeek and Megatron do

/// Whether the mask [T] int8, which may be absent, leaves token `t` out.
inline bool is_padding(const ConstTensor& mask, std::int64_t t) {
  return !mask.absent() && mask.as<std::int8_t>()[t] == 0;
}

/// Throws bad_argument unless `routing` is what route() left for these options.
inline void require(const RouterOptions& options, const Routing& routing) {
  const std::int64_t tokens = routing.scores.shape().rank() == 2 ? routing.scores.size(0) : 0;
  require("scores of the routing", routing.scores, DType::f32, {tokens, options.experts});
  require("weights of the routing", routing.weights, DType::f32, {tokens, slots_of(options)});
}

}  // namespace expar
