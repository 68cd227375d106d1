// Counts the arrays of a layer.
#include "planner/memory.h"

#include <cmath>

namespace expar::planner {

Memory memory_of(const LayerSizes& sizes, const Share& share) {
  constexpr std::int64_t kFloat = 4;
  const auto element = static_cast<std::int64_t>(size_of(sizes.dtype));
  const std::int64_t halves = sizes.gated ? 2 : 1;
  const std::int64_t hidden = sizes.hidden;
  const std::int64_t up_rows = halves * share.inner;
  const bool shared = sizes.shared_inner > 0;
  const std::int64_t shared_rows = shared ? halves * sizes.shared_inner : 0;

  // What has a copy of low precision, and what is f32 everywhere.
  const std::int64_t matrices =
      share.experts * hidden * (up_rows + share.inner) + hidden * (shared_rows + sizes.shared_inner);
  const std::int64_t rest = sizes.experts * hidden + (sizes.bias ? share.experts * (up_rows + hidden) : 0) +
                            (shared && sizes.shared_gate ? hidden : 0);

  Memory memory;
  const bool copies = sizes.dtype != DType::f32;
  memory.weights = kFloat * (matrices + rest) + (copies ? element * matrices : 0);
  memory.gradients = kFloat * (matrices + rest);
  memory.optimizer = 2 * kFloat * (matrices + rest);
  memory.packed_weights = element * matrices + kFloat * rest;

  // x; scores [T, E] and their logarithmic sum; ids, weights and chosen scores [T, K]. Of shared experts also f32
  // results.
  const std::int64_t per_token = element * hidden + kFloat * (sizes.experts + 1 + 3 * sizes.topk) +
                                 element * (shared_rows + sizes.shared_inner) + (shared ? kFloat * hidden : 0) +
                                 (shared && sizes.shared_gate ? kFloat : 0);
  const auto per_row = static_cast<double>(element * (up_rows + share.inner));
  memory.activations = share.tokens * per_token + std::llround(std::ceil(share.received * per_row));
  memory.arena =
      std::llround(std::ceil((share.received + share.received_unique) * static_cast<double>(element * hidden)));
  return memory;
}

}  // namespace expar::planner
