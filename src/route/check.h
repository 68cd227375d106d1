// What the files of the router share: what they refuse, and the numbers of their formulas.
#pragma once

#include <string>

#include <expar/error.h>
#include <expar/router.h>

namespace expar {

inline constexpr std::int64_t kGrain = 256;  // tokens per task: some ten microseconds at 64 experts
inline constexpr float kTiny = 1e-20F;       // beside the sums that scores are divided by, as DeepSeek and Megatron do

/// Whether the mask [T] int8, which may be absent, leaves token `t` out.
inline bool is_padding(const ConstTensor& mask, std::int64_t t) {
  return !mask.absent() && mask.as<std::int8_t>()[t] == 0;
}

[[noreturn]] inline void refuse(std::string message) { throw Error(ErrorCode::bad_argument, std::move(message)); }

/// Throws bad_argument unless `tensor` is of `shape` and `dtype`.
inline void require(const char* what, const ConstTensor& tensor, const Shape& shape, DType dtype = DType::f32) {
  if (tensor.dtype() == dtype && tensor.shape() == shape) return;
  refuse(std::string(what) + " is " + std::string(name(tensor.dtype())) + " " + tensor.shape().str() + ", should be " +
         std::string(name(dtype)) + " " + shape.str());
}

/// Throws bad_argument unless `routing` is what route() left for these options.
inline void require(const RouterOptions& options, const Routing& routing) {
  const std::int64_t tokens = routing.scores.shape().rank() == 2 ? routing.scores.size(0) : 0;
  require("scores of the routing", routing.scores, {tokens, options.experts});
  require("weights of the routing", routing.weights, {tokens, slots_of(options)});
}

}  // namespace expar
