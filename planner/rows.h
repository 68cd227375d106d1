// How many rows go from each rank to each other: expected of a router that chooses evenly, or counted in real routes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace expar::planner {

/// Of `ranks` ranks that share the experts as experts_of() says. Expected numbers are no whole ones.
struct Rows {
  int ranks = 1;
  /// [source, destination] rows that go there where each goes once, however many experts it meets.
  std::vector<double> once;
  /// [source, destination] rows that go there where one goes for each slot, in units of slot_times / slot_over: whole
  /// numbers, so that sums and comparisons are exact.
  std::vector<double> slots;
  double slot_times = 1;
  double slot_over = 1;

  std::size_t at(int source, int destination) const {
    return static_cast<std::size_t>(source) * static_cast<std::size_t>(ranks) + static_cast<std::size_t>(destination);
  }
  double slot_rows(int source, int destination) const {
    return slots[at(source, destination)] * slot_times / slot_over;
  }
};

/// The expectation where each token takes `topk` different experts and all choices are equally likely.
///   tokens : of each rank
/// A token misses the n experts of a rank with chance C(E - n, K) / C(E, K) (hypergeometric), so `once` is tokens times
/// one less that; K n / E of its slots go there, so `slots` counts n in units of tokens K / E.
/// Cost: O(P^2 + P K).
Rows expected_rows(int ranks, std::int64_t tokens, std::int64_t experts, std::int64_t topk);

/// Choices of a router: rank r has the tokens from r * tokens on.
struct Routes {
  std::span<const std::int32_t> ids;  // [ranks * tokens, topk], each in [0, experts), the best choice first
  std::int64_t tokens = 0;
  std::int64_t topk = 0;
};

/// What the first `choices` slots of the routes need.
///   sources : [P] whose tokens each rank sends: its own number in the routes, or those of a group that works as one
/// Cost: one pass over the ids.
Rows counted_rows(const Routes& routes, std::int64_t choices, std::int64_t experts,
                  const std::vector<std::vector<int>>& sources);

}  // namespace expar::planner
