// The ratio of what the probes allow to what an operation took.
#include "bench/peak.h"

#include <algorithm>

namespace expar::bench {

PeakProbes::PeakProbes(const Context& context, const Work& work, DType dtype)
    : work_(work), read_(context, static_cast<std::int64_t>(work.bytes)), compute_(context, dtype) {}

void PeakProbes::append(std::vector<Step>& steps) {
  steps.push_back({nullptr, [this] { read_.run(); }});
  steps.push_back({nullptr, [this] { compute_.run(); }});
}

double PeakProbes::of_peak(const Times& times, std::size_t operation, std::size_t first) const {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < times[operation].size(); ++i) {
    const double reading = work_.bytes / read_.bytes() * times[first][i];
    const double computing = work_.flops / compute_.flops() * times[first + 1][i];
    ratios.push_back(std::max(reading, computing) / times[operation][i]);
  }
  return median(ratios);
}

}  // namespace expar::bench
