// Splits a range of independent elements over a pool.
#pragma once

#include <algorithm>
#include <cstdint>

#include <expar/pool.h>

namespace expar {

/// Calls body(begin, end) for pieces of [0, count) of `grain` elements; a single piece runs without waking a worker.
inline void for_ranges(Pool& pool, std::int64_t count, std::int64_t grain,
                       FunctionRef<void(std::int64_t begin, std::int64_t end)> body) {
  if (count <= grain) {
    if (count > 0) body(0, count);
    return;
  }
  pool.run((count + grain - 1) / grain,
           [&](std::int64_t i, int) { body(i * grain, std::min(count, (i + 1) * grain)); });
}

}  // namespace expar
