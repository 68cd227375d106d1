// Questions for a planner.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <expar/random.h>

#include "planner/planner.h"

namespace expar::planner {

inline Question question_of(std::vector<MeshDim> dims, int ranks_per_node, std::int64_t experts, std::int64_t topk,
                            std::int64_t tokens = 5) {
  return {.sizes = {.hidden = 10, .inner = 7, .experts = experts, .topk = topk},
          .tokens = tokens,
          .grid = Grid(std::move(dims), ranks_per_node),
          .ids = {}};
}

/// K different experts for each token, the first ones more often.
inline void draw_ids(Question& question) {
  const Random random(7, "planner");
  const auto experts = static_cast<std::uint64_t>(question.sizes.experts);
  std::uint64_t drawn = 0;
  for (std::int64_t token = 0; token < question.grid.ranks() * question.tokens; ++token) {
    std::vector<std::int32_t> chosen;
    while (static_cast<std::int64_t>(chosen.size()) < question.sizes.topk) {
      const auto one = random.bits(drawn++) % experts;
      const auto id = static_cast<std::int32_t>(std::min(one, random.bits(drawn++) % experts));
      if (std::find(chosen.begin(), chosen.end(), id) == chosen.end()) chosen.push_back(id);
    }
    question.ids.insert(question.ids.end(), chosen.begin(), chosen.end());
  }
}

}  // namespace expar::planner
