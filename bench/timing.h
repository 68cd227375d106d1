// Times several things in turn, round after round, so that what disturbs one disturbs the others too.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <expar/context.h>

namespace expar::bench {

/// One thing to time. Every rank has finished `prepare` when any rank starts `timed`.
struct Step {
  std::function<void()> prepare;
  std::function<void()> timed;
};

/// For each step, for each round: microseconds from the first rank's start to the last one's end. Where ranks outnumber
/// cores some start late, and what they wait for a core belongs to the operation.
using Times = std::vector<std::vector<double>>;

/// Runs all steps in every round, for about `seconds`, and at least seven rounds. Collective.
Times measure_rounds(const Context& context, double seconds, const std::vector<Step>& steps);

/// The least value that a share of `share` of the values do not exceed.
double percentile(std::vector<double> values, double share);
inline double median(std::vector<double> values) { return percentile(std::move(values), 0.5); }

/// The ranks' values one after the other, [P * n]. Collective; n is the same everywhere.
std::vector<std::int64_t> gather_all(const Context& context, const std::vector<std::int64_t>& mine);
/// Collective.
std::int64_t sum_over_ranks(const Context& context, std::int64_t mine);
std::int64_t max_over_ranks(const Context& context, std::int64_t mine);

}  // namespace expar::bench
