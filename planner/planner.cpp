// Puts rows, links and arrays together.
#include "planner/planner.h"

#include <algorithm>
#include <string>

#include <expar/error.h>
#include <expar/plan.h>

#include "planner/memory.h"

namespace expar::planner {
namespace {

using Groups = std::vector<std::vector<int>>;

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::bad_argument, message); }

void check(const Question& question) {
  const LayerSizes& sizes = question.sizes;
  const auto positive = [](const char* name, std::int64_t value) {
    if (value < 1) refuse(std::string(name) + " is " + std::to_string(value) + ", must be at least 1");
  };
  positive("tokens", question.tokens);
  positive("hidden", sizes.hidden);
  positive("inner", sizes.inner);
  positive("experts", sizes.experts);
  positive("topk", sizes.topk);
  if (sizes.topk > sizes.experts) {
    refuse("topk " + std::to_string(sizes.topk) + " is above the " + std::to_string(sizes.experts) + " experts");
  }
  const auto slots = static_cast<std::size_t>(question.grid.ranks() * question.tokens * sizes.topk);
  if (!question.ids.empty() && question.ids.size() != slots) {
    refuse("there are " + std::to_string(question.ids.size()) + " ids for " + std::to_string(slots) + " slots");
  }
  for (const std::int32_t id : question.ids) {
    if (id < 0 || id >= sizes.experts) {
      refuse("expert " + std::to_string(id) + " of the routes is none of the " + std::to_string(sizes.experts));
    }
  }
}

double row_bytes(const Question& question) {
  return static_cast<double>(question.sizes.hidden) * static_cast<double>(size_of(question.sizes.dtype));
}

/// Rows of the first `choices` slots; sources[r] names the ranks whose tokens rank r of the group sends.
Rows rows_of(const Question& question, const Groups& sources, std::int64_t choices) {
  const LayerSizes& sizes = question.sizes;
  if (question.ids.empty()) {
    const auto holders = static_cast<std::int64_t>(sources.front().size());
    return expected_rows(static_cast<int>(sources.size()), question.tokens * holders, sizes.experts, choices);
  }
  return counted_rows({.ids = question.ids, .tokens = question.tokens, .topk = sizes.topk}, choices, sizes.experts,
                      sources);
}

/// Each rank sends its own tokens.
Groups alone(const std::vector<int>& group) {
  Groups sources;
  for (const int rank : group) sources.push_back({rank});
  return sources;
}

/// Groups of ranks that are no data-parallel copies of each other.
Groups whole_groups(const Grid& grid) { return grid.groups({"ep", "tp"}); }

std::vector<Rows> rows_of_groups(const Question& question, std::int64_t choices) {
  std::vector<Rows> all;
  for (const std::vector<int>& group : whole_groups(question.grid)) {
    all.push_back(rows_of(question, alone(group), choices));
    if (question.ids.empty()) break;  // all groups are alike
  }
  return all;
}

/// amount(group, its rows) over all groups.
template <class Amount>
Traffic over_groups(const Grid& grid, const std::vector<Rows>& rows, Amount amount) {
  Traffic traffic;
  const Groups groups = whole_groups(grid);
  for (std::size_t g = 0; g < groups.size(); ++g) traffic += amount(groups[g], rows[std::min(g, rows.size() - 1)]);
  return traffic;
}

/// A ring each way in each of `groups`, with the tokens of one rank as a piece: an all-reduce, or an all-gather and a
/// reduce-scatter.
Traffic two_rings(const Question& question, const Groups& groups) {
  const double piece = static_cast<double>(question.tokens) * row_bytes(question);
  Traffic traffic;
  for (const std::vector<int>& group : groups) {
    const Traffic one = ring_all_gather(question.grid, group, std::vector<double>(group.size(), piece));
    traffic += one;
    traffic += one;
  }
  return traffic;
}

/// For each rank the ranks of its group along tp: they hold the same tokens after gathering them.
Groups holders_of(const Grid& grid) {
  Groups holders(static_cast<std::size_t>(grid.ranks()));
  for (const std::vector<int>& group : grid.groups({"tp"})) {
    for (const int rank : group) holders[static_cast<std::size_t>(rank)] = group;
  }
  return holders;
}

/// Calls see(group along ep, its rows) for each such group.
template <class See>
void along_ep(const Question& question, See see) {
  const Groups holders = holders_of(question.grid);
  for (const std::vector<int>& group : question.grid.groups({"ep"})) {
    Groups sources;
    for (const int rank : group) sources.push_back(holders[static_cast<std::size_t>(rank)]);
    see(group, rows_of(question, sources, question.sizes.topk));
  }
}

Traffic expert_tensor(const Question& question) {
  const Grid& grid = question.grid;
  Traffic traffic = two_rings(question, grid.groups({"tp"}));
  along_ep(question, [&](const std::vector<int>& group, const Rows& rows) {
    traffic += once_each(rows, grid, group, row_bytes(question));
    traffic += once_per_slot(rows, grid, group, row_bytes(question));
  });
  return traffic;
}

Memory most_memory(const Question& question) {
  const LayerSizes& sizes = question.sizes;
  const int tp = question.grid.size("tp");
  Memory most;
  along_ep(question, [&](const std::vector<int>&, const Rows& rows) {
    for (int rank = 0; rank < rows.ranks; ++rank) {
      Share share{.experts = experts_of(rank, rows.ranks, sizes.experts).count,
                  .inner = (sizes.inner + tp - 1) / tp,
                  .tokens = question.tokens * tp};
      for (int source = 0; source < rows.ranks; ++source) {
        share.received += rows.slot_rows(source, rank);
        if (source != rank) share.received_unique += rows.once[rows.at(source, rank)];
      }
      const Memory memory = memory_of(sizes, share);
      if (memory.training() > most.training()) most = memory;
    }
  });
  return most;
}

Traffic gather_slices(const Question& question) {
  Traffic traffic;
  const auto element = static_cast<double>(size_of(question.sizes.dtype));
  for (const std::vector<int>& group : whole_groups(question.grid)) {
    const int ranks = static_cast<int>(group.size());
    const double tokens = static_cast<double>(question.tokens * ranks);
    std::vector<double> pieces;
    for (int rank = 0; rank < ranks; ++rank) {
      pieces.push_back(tokens * element * static_cast<double>(experts_of(rank, ranks, question.sizes.hidden).count));
    }
    traffic += ring_all_gather(question.grid, group, pieces);
  }
  return traffic;
}

CurvePoint point(const Question& question, std::int64_t choices) {
  const std::vector<Rows> rows = rows_of_groups(question, choices);
  const auto total = [&](auto way) {
    return over_groups(question.grid, rows,
                       [&](const std::vector<int>& group, const Rows& r) {
                         return way(r, question.grid, group, row_bytes(question));
                       })
        .bytes();
  };
  const double slots = total(once_per_slot);
  return {.topk = choices, .ep = total(once_each) + slots, .ep_per_slot = 2 * slots};
}

/// The least K up to `most` at which ep moves no fewer than `bytes`: more choices never move fewer.
std::optional<std::int64_t> crossover_of_ep(const Question& question, std::int64_t most, double bytes) {
  if (bytes == 0) return {};
  std::int64_t low = 0;
  std::int64_t high = most + 1;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (point(question, middle).ep < bytes ? low : high) = middle;
  }
  return high <= most ? std::optional(high) : std::nullopt;
}

}  // namespace

Answer plan(const Question& question) {
  check(question);
  const LayerSizes& sizes = question.sizes;
  const Grid& grid = question.grid;
  const double bytes = row_bytes(question);
  const std::vector<Rows> rows = rows_of_groups(question, sizes.topk);

  Answer answer;
  answer.dispatch = over_groups(grid, rows, [&](const auto& g, const Rows& r) { return once_each(r, grid, g, bytes); });
  answer.combine =
      over_groups(grid, rows, [&](const auto& g, const Rows& r) { return once_per_slot(r, grid, g, bytes); });
  Traffic ep = answer.dispatch;
  ep += answer.combine;
  Traffic per_slot = answer.combine;
  per_slot += answer.combine;
  const Traffic tp = two_rings(question, whole_groups(grid));
  const Traffic hidden = over_groups(grid, rows, [&](const auto& g, const Rows& r) {
    return slices_per_slot(r, grid, g, sizes.hidden, static_cast<double>(size_of(sizes.dtype)));
  });
  answer.ways = {{"ep", "EP, a row once to each rank", ep},
                 {"ep_per_slot", "EP, a row for each slot", per_slot},
                 {"tp", "TP, all-reduce", tp},
                 {"allgather_reducescatter", "all-gather and reduce-scatter", tp},
                 {"hidden", "hidden partition", hidden},
                 {"hidden_allgather", "  and its all-gather", gather_slices(question)}};
  if (grid.size("ep") > 1 && grid.size("tp") > 1) {
    answer.ways.push_back({"etp", "expert-tensor, as the mesh says", expert_tensor(question)});
  }

  const std::int64_t least = crossover(rows);
  if (least > 0 && least <= sizes.experts) answer.crossover = least;
  const std::int64_t most = question.ids.empty() ? sizes.experts : sizes.topk;
  answer.crossover_once = crossover_of_ep(question, most, tp.bytes());
  answer.memory = most_memory(question);
  return answer;
}

std::vector<CurvePoint> curve(const Question& question, const std::vector<std::int64_t>& choices) {
  std::vector<CurvePoint> points;
  for (const std::int64_t k : choices) points.push_back(point(question, k));
  return points;
}

}  // namespace expar::planner
