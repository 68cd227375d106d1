// Rounds of steps, and the few collective numbers that benchmarks need.
#include "bench/timing.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include <expar/collectives.h>

namespace expar::bench {
namespace {

constexpr std::int64_t kWarmUp = 3;
constexpr std::int64_t kFewest = 7;
constexpr std::int64_t kMost = 5000;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::int64_t now() { return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count(); }

/// Appends when this rank started and ended each step, in nanoseconds of the host's one clock.
void run_round(const Context& context, const std::vector<Step>& steps, std::vector<std::int64_t>& times) {
  for (const Step& step : steps) {
    if (step.prepare) step.prepare();
    barrier(context);
    times.push_back(now());
    step.timed();
    times.push_back(now());
  }
}

}  // namespace

Times measure_rounds(const Context& context, double seconds, const std::vector<Step>& steps) {
  std::vector<std::int64_t> times;
  const auto start = Clock::now();
  for (std::int64_t i = 0; i < kWarmUp; ++i) run_round(context, steps, times);
  const double each = seconds_since(start) / kWarmUp;
  const auto wanted = static_cast<std::int64_t>(std::min(seconds / each, 1e9));
  // All ranks must do the same number, and none has measured the same.
  const std::int64_t rounds = max_over_ranks(context, std::clamp(wanted, kFewest, kMost));
  times.clear();
  for (std::int64_t i = 0; i < rounds; ++i) run_round(context, steps, times);

  const std::vector<std::int64_t> all = gather_all(context, times);
  Times result(steps.size());
  for (std::size_t at = 0; at < times.size(); at += 2) {
    std::int64_t first = all[at];
    std::int64_t last = all[at + 1];
    for (std::size_t of_rank = at; of_rank < all.size(); of_rank += times.size()) {
      first = std::min(first, all[of_rank]);
      last = std::max(last, all[of_rank + 1]);
    }
    result[at / 2 % steps.size()].push_back(static_cast<double>(last - first) * 1e-3);
  }
  return result;
}

double percentile(std::vector<double> values, double share) {
  const auto count = static_cast<double>(values.size());
  const auto at = static_cast<std::ptrdiff_t>(std::max(std::ceil(share * count) - 1, 0.0));
  std::nth_element(values.begin(), values.begin() + at, values.end());
  return values[static_cast<std::size_t>(at)];
}

std::vector<std::int64_t> gather_all(const Context& context, const std::vector<std::int64_t>& mine) {
  std::vector<std::int64_t> all(mine.size() * static_cast<std::size_t>(context.size()));
  all_gather(context, ConstTensor(mine.data(), Shape{static_cast<std::int64_t>(mine.size())}),
             Tensor(all.data(), Shape{static_cast<std::int64_t>(all.size())}));
  return all;
}

std::int64_t sum_over_ranks(const Context& context, std::int64_t mine) {
  std::int64_t sum = 0;
  for (const std::int64_t value : gather_all(context, {mine})) sum += value;
  return sum;
}

std::int64_t max_over_ranks(const Context& context, std::int64_t mine) {
  const std::vector<std::int64_t> all = gather_all(context, {mine});
  return *std::max_element(all.begin(), all.end());
}

}  // namespace expar::bench
