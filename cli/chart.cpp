// Small charts for a terminal.
#include "cli/chart.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace expar::cli {
namespace {

constexpr std::size_t kColumns = 64;
constexpr const char* kHeights[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
constexpr double kMean = 4;  // the height of the mean, of 8

double mean_of(std::span<const std::int64_t> loads) {
  const std::int64_t sum = std::accumulate(loads.begin(), loads.end(), std::int64_t{0});
  return static_cast<double>(sum) / static_cast<double>(loads.size());
}

}  // namespace

std::string chart_of_loads(std::span<const std::int64_t> loads) {
  const double mean = mean_of(loads);
  const std::size_t columns = std::min(kColumns, loads.size());
  std::string text;
  for (std::size_t c = 0; c < columns; ++c) {
    const auto part =
        loads.subspan(c * loads.size() / columns, (c + 1) * loads.size() / columns - c * loads.size() / columns);
    const auto most = static_cast<double>(*std::max_element(part.begin(), part.end()));
    // Who has a little is seen: an empty column is an expert without a token.
    const double height = most == 0 ? 0 : std::clamp(std::round(kMean * most / mean), 1.0, 8.0);
    text += kHeights[static_cast<std::size_t>(height)];
  }
  return text;
}

double max_over_mean(std::span<const std::int64_t> loads) {
  const double mean = mean_of(loads);
  return mean == 0 ? 1.0 : static_cast<double>(*std::max_element(loads.begin(), loads.end())) / mean;
}

}  // namespace expar::cli
