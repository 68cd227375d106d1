// How many slots each rank asks of each expert, and which of them an expert has room for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "src/util/check.h"

namespace expar {

/// The slots that the ranks of one scope ask for: `counts` [ranks, E], of which row `self` is this rank's.
struct Requests {
  std::int64_t experts = 0;
  std::vector<std::int64_t> counts;
  int self = 0;

  int ranks() const { return static_cast<int>(counts.size() / at(experts)); }
  std::int64_t of(int rank, std::int64_t expert) const { return counts[at(rank * experts + expert)]; }
  /// Of the ranks below `end`.
  std::int64_t below(int end, std::int64_t expert) const {
    std::int64_t sum = 0;
    for (int rank = 0; rank < end; ++rank) sum += of(rank, expert);
    return sum;
  }
  std::int64_t total(std::int64_t expert) const { return below(ranks(), expert); }
  /// How many of this rank's requests an expert with `room` grants, if it grants the first of all.
  std::int64_t granted(std::int64_t expert, std::int64_t room) const {
    return std::clamp<std::int64_t>(room - below(self, expert), 0, of(self, expert));
  }
};

/// [E] how often each expert stands in `ids`.
inline std::vector<std::int64_t> counts_of(std::span<const std::int32_t> ids, std::int64_t experts) {
  std::vector<std::int64_t> counts(at(experts));
  for (const std::int32_t id : ids)
    if (id >= 0) ++counts[at(id)];
  return counts;
}

}  // namespace expar
