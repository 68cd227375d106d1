// What the functions of the router refuse, in one place.
#pragma once

#include <string>

#include <expar/error.h>
#include <expar/router.h>

namespace expar {

[[noreturn]] inline void refuse(std::string message) { throw Error(ErrorCode::bad_argument, std::move(message)); }

/// Throws bad_argument unless `tensor` is f32 of `shape`.
inline void require(const char* what, const ConstTensor& tensor, const Shape& shape) {
  if (tensor.dtype() == DType::f32 && tensor.shape() == shape) return;
  refuse(std::string(what) + " is " + std::string(name(tensor.dtype())) + " " + tensor.shape().str() +
         ", should be f32 " + shape.str());
}

/// Throws bad_argument unless `routing` is what route() left for these options.
inline void require(const RouterOptions& options, const Routing& routing) {
  const std::int64_t tokens = routing.scores.shape().rank() == 2 ? routing.scores.size(0) : 0;
  require("scores of the routing", routing.scores, {tokens, options.experts});
  require("weights of the routing", routing.weights, {tokens, options.topk});
}

}  // namespace expar
