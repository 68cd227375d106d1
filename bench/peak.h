// How near to the limits of the machine an operation comes, measured beside it.
#pragma once

#include <vector>

#include "bench/limits.h"
#include "bench/timing.h"

namespace expar::bench {

/// What an operation cannot do without, on the rank that has most of it.
struct Work {
  double bytes = 0;  // read and written once
  double flops = 0;
};

/// The two probes, as steps to interleave with an operation.
class PeakProbes {
 public:
  PeakProbes(const Context& context, const Work& work, DType dtype);
  /// Appends two steps; `this` must outlive them.
  void append(std::vector<Step>& steps);
  /// max(bytes / bandwidth, flops / peak) / time, the median over rounds; `first` is the first of the two steps.
  double of_peak(const Times& times, std::size_t operation, std::size_t first) const;

 private:
  Work work_;
  ReadProbe read_;
  ComputeProbe compute_;
};

}  // namespace expar::bench
