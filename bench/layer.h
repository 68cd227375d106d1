// The layer that benchmarks run.
#pragma once

#include <expar/layer.h>

#include "bench/bench.h"

namespace expar::bench {

MoeLayerOptions layer_options(const Parallel& ranks, const Options& options);

/// "layer_forward" twice: options.batches parts of each rank's tokens one after the other, and in flight together.
/// Collective.
std::vector<Row> measure_overlap(const Parallel& ranks, const Options& options);

}  // namespace expar::bench
