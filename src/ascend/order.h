// Slots sorted by their expert.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "src/ascend/elements.h"

namespace expar::ascend {

inline constexpr std::int64_t kMaxSlots = std::numeric_limits<std::int32_t>::max();

/// The places of ascending keys, equal ones in their order: what torch calls a stable argsort.
inline std::vector<std::int32_t> sorted_order(const std::vector<std::int64_t>& keys) {
  std::vector<std::int32_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return keys[at(a)] < keys[at(b)]; });
  return order;
}

/// The elements of an int32 or int64 tensor.
inline std::vector<std::int64_t> integers(const ConstTensor& tensor) {
  std::vector<std::int64_t> all(at(tensor.elements()));
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = integer(tensor, static_cast<std::int64_t>(i));
  return all;
}

}  // namespace expar::ascend
