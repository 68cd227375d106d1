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

/// Appends this rank's nanoseconds of each step.
void run_round(const Context& context, const std::vector<Step>& steps, std::vector<std::int64_t>& times) {
  for (const Step& step : steps) {
    if (step.prepare) step.prepare();
    barrier(context);
    const auto start = Clock::now();
    step.timed();
    times.push_back(std::chrono::nanoseconds(Clock::now() - start).count());
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
  Times result(steps.size(), std::vector<double>(static_cast<std::size_t>(rounds)));
  for (std::size_t i = 0; i < all.size(); ++i) {
    const std::size_t at = i % times.size();
    double& slowest = result[at % steps.size()][at / steps.size()];
    slowest = std::max(slowest, static_cast<double>(all[i]) * 1e-3);
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
