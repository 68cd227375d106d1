// Expected and counted rows.
#include "planner/rows.h"

#include <algorithm>

#include <expar/plan.h>

namespace expar::planner {
namespace {

Rows no_rows(int ranks) {
  const auto pairs = static_cast<std::size_t>(ranks) * static_cast<std::size_t>(ranks);
  Rows rows;
  rows.ranks = ranks;
  rows.once.assign(pairs, 0);
  rows.slots.assign(pairs, 0);
  return rows;
}

/// That one of K different experts out of E is among n of them.
double chance_of_a_visit(std::int64_t n, std::int64_t experts, std::int64_t topk) {
  double miss = 1;
  for (std::int64_t k = 0; k < topk && miss > 0; ++k) {
    miss *= static_cast<double>(std::max<std::int64_t>(experts - n - k, 0)) / static_cast<double>(experts - k);
  }
  return 1 - miss;
}

}  // namespace

Rows expected_rows(int ranks, std::int64_t tokens, std::int64_t experts, std::int64_t topk) {
  Rows rows = no_rows(ranks);
  rows.slot_times = static_cast<double>(tokens) * static_cast<double>(topk);
  rows.slot_over = static_cast<double>(experts);
  for (int destination = 0; destination < ranks; ++destination) {
    const std::int64_t n = experts_of(destination, ranks, experts).count;
    const double once = static_cast<double>(tokens) * chance_of_a_visit(n, experts, topk);
    for (int source = 0; source < ranks; ++source) {
      rows.once[rows.at(source, destination)] = once;
      rows.slots[rows.at(source, destination)] = static_cast<double>(n);
    }
  }
  return rows;
}

Rows counted_rows(const Routes& routes, std::int64_t choices, std::int64_t experts,
                  const std::vector<std::vector<int>>& sources) {
  const int ranks = static_cast<int>(sources.size());
  Rows rows = no_rows(ranks);
  std::vector<int> owners(static_cast<std::size_t>(experts));
  for (std::int64_t e = 0; e < experts; ++e) owners[static_cast<std::size_t>(e)] = owner_of(e, ranks, experts);
  std::vector<std::int64_t> visited(static_cast<std::size_t>(ranks), -1);  // by which token last
  for (int source = 0; source < ranks; ++source) {
    for (const int holder : sources[static_cast<std::size_t>(source)]) {
      for (std::int64_t token = holder * routes.tokens; token < (holder + 1) * routes.tokens; ++token) {
        for (std::int64_t k = 0; k < choices; ++k) {
          const auto id = static_cast<std::size_t>(routes.ids[static_cast<std::size_t>(token * routes.topk + k)]);
          const int owner = owners[id];
          rows.slots[rows.at(source, owner)] += 1;
          if (visited[static_cast<std::size_t>(owner)] == token) continue;
          visited[static_cast<std::size_t>(owner)] = token;
          rows.once[rows.at(source, owner)] += 1;
        }
      }
    }
  }
  return rows;
}

}  // namespace expar::planner
