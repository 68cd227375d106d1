// Splits a range of independent elements over a pool, in the kernels' floating-point mode.
#pragma once

#include <algorithm>
#include <cstdint>

#include <expar/pool.h>

#include "src/util/processor.h"

namespace expar {

/// Calls body(begin, end) for pieces of [0, count) of `grain` elements; a single piece runs without waking a worker.
inline void for_ranges(Pool& pool, std::int64_t count, std::int64_t grain,
                       FunctionRef<void(std::int64_t begin, std::int64_t end)> body) {
  const auto piece = [&](std::int64_t i, int) {
    const FloatMode mode;
    body(i * grain, std::min(count, (i + 1) * grain));
  };
  const std::int64_t pieces = (count + grain - 1) / grain;
  if (pieces == 1) piece(0, 0);
  if (pieces > 1) pool.run(pieces, piece);
}

}  // namespace expar
