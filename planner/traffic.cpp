// Sums over pairs of ranks.
#include "planner/traffic.h"

#include <cmath>
#include <numeric>

#include <expar/plan.h>

namespace expar::planner {
namespace {

/// Adds up amount(source, destination) over all pairs of different ranks, link by link.
template <class Amount>
Traffic sum(const Grid& grid, const std::vector<int>& group, Amount amount) {
  Traffic traffic;
  const int ranks = static_cast<int>(group.size());
  for (int source = 0; source < ranks; ++source) {
    for (int destination = 0; destination < ranks; ++destination) {
      if (source == destination) continue;
      const bool near =
          grid.node(group[static_cast<std::size_t>(source)]) == grid.node(group[static_cast<std::size_t>(destination)]);
      (near ? traffic.within_node : traffic.between_nodes) += amount(source, destination);
    }
  }
  return traffic;
}

/// Multiplied before it is divided: what is whole stays exact.
Traffic times(const Traffic& traffic, double factor, double over) {
  return {traffic.within_node * factor / over, traffic.between_nodes * factor / over};
}

}  // namespace

Traffic once_each(const Rows& rows, const Grid& grid, const std::vector<int>& group, double row_bytes) {
  return times(sum(grid, group, [&](int s, int d) { return rows.once[rows.at(s, d)]; }), row_bytes, 1);
}

Traffic once_per_slot(const Rows& rows, const Grid& grid, const std::vector<int>& group, double row_bytes) {
  return times(sum(grid, group, [&](int s, int d) { return rows.slots[rows.at(s, d)]; }), rows.slot_times * row_bytes,
               rows.slot_over);
}

Traffic ring_all_gather(const Grid& grid, const std::vector<int>& group, const std::vector<double>& pieces) {
  const double whole = std::accumulate(pieces.begin(), pieces.end(), 0.0);
  const int ranks = static_cast<int>(group.size());
  return sum(grid, group, [&](int source, int destination) {
    return destination == (source + 1) % ranks ? whole - pieces[static_cast<std::size_t>(destination)] : 0.0;
  });
}

Traffic slices_per_slot(const Rows& rows, const Grid& grid, const std::vector<int>& group, std::int64_t hidden,
                        double element_bytes) {
  std::vector<double> results(group.size(), 0);  // slots whose result lies on each rank
  std::vector<double> slice(group.size());
  for (int rank = 0; rank < rows.ranks; ++rank) {
    for (int source = 0; source < rows.ranks; ++source) {
      results[static_cast<std::size_t>(rank)] += rows.slots[rows.at(source, rank)];
    }
    // Shared out as experts are.
    slice[static_cast<std::size_t>(rank)] = static_cast<double>(experts_of(rank, rows.ranks, hidden).count);
  }
  const Traffic elements = sum(grid, group, [&](int owner, int taker) {
    return results[static_cast<std::size_t>(owner)] * slice[static_cast<std::size_t>(taker)];
  });
  return times(elements, rows.slot_times * element_bytes, rows.slot_over);
}

std::int64_t crossover(const std::vector<Rows>& groups) {
  double all = 0, leaving = 0;
  for (const Rows& rows : groups) {
    for (int source = 0; source < rows.ranks; ++source) {
      for (int destination = 0; destination < rows.ranks; ++destination) {
        const double slots = rows.slots[rows.at(source, destination)];
        all += slots;
        if (source != destination) leaving += slots;
      }
    }
  }
  if (leaving == 0) return 0;
  // K leaving / all rows of T per rank, against P - 1.
  return static_cast<std::int64_t>(std::ceil((groups.front().ranks - 1) * all / leaving));
}

}  // namespace expar::planner
