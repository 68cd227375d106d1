// What one layer takes on the rank that takes most.
#pragma once

#include <cstdint>

#include "planner/planner.h"

namespace expar::planner {

/// The share of one rank in a layer, as MoeLayer holds it there. Tensor parallelism divides F, and gives all ranks of a
/// tp group the tokens of all.
struct Share {
  std::int64_t experts = 0;    // L
  std::int64_t inner = 0;      // of F
  std::int64_t tokens = 0;     // that the rank routes
  double received = 0;         // R
  double received_unique = 0;  // U
};

/// Source: include/expar/layer.h (Parameter, MoeRecord), AdamW's two moments.
Memory memory_of(const LayerSizes& sizes, const Share& share);

}  // namespace expar::planner
