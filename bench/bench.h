// The one runner of all benchmarks: what is measured, on which sizes, and the row that comes out.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <expar/expar.h>
#include <expar/mesh.h>
#include <expar/parallel.h>

namespace expar::bench {

struct Options {
  std::int64_t tokens = 1024;  // T, of each rank
  std::int64_t hidden = 2048;
  std::int64_t inner = 768;
  std::int64_t experts = 64;
  std::int64_t topk = 8;
  DType dtype = DType::bf16;
  Activation activation = Activation::swiglu;
  ActivationNumbers numbers = {};  // of the activation
  bool bias = false;
  bool train = false;  // layer: also a training step
  int batches = 1;     // layer: parts of each rank's tokens, for inference one after the other and in flight together
  std::chrono::microseconds late{0};  // with batches: how long the last rank is late for each of them
  Layout layout = Layout::indexed;
  /// combine: all ranks have the tokens of all, and each reads its slice of the results (expar/partition.h).
  bool hidden_partition = false;
  /// dispatch, combine, layer: how ranks share the experts, see expar/parallel.h; empty: all along ep. Ranks along tp
  /// work on the tokens of all of them, rank after rank.
  std::vector<MeshDim> mesh = {};
  std::string routes = "uniform";  // uniform, zipf:A, hot:N:F, or a file
  double seconds = 2;              // to spend on each measurement
};

/// Times are from the first rank's start to the last one's end, round by round.
struct Row {
  std::string what;
  double p50_us = 0;
  double p99_us = 0;
  /// Payload: between ranks, of all ranks together; of experts and layers, on the rank that has most.
  std::optional<std::int64_t> bytes;
  std::optional<double> gbps;         // bytes / p50
  std::optional<double> of_copy;      // time of the plain copy (or the plain read) / ours
  std::optional<double> of_peak;      // time that the machine's limits allow / ours
  std::optional<int> in_flight;       // micro-batches at once
  std::optional<double> dispatch_us;  // of the first rank, in dispatch: waiting and copying
  std::int64_t wrong = 0;             // elements found wrong before or after timing
  bool routed = true;                 // false: sizes of routing do not apply
};

/// The names that measure() knows.
const std::vector<std::string>& names();

/// Throws Error: bad_argument (options that cannot be, naming flag and value). Reads the routes file, if there is one,
/// and fills in the sizes that it fixes where `experts_given` and `topk_given` are false.
void check(Options& options, bool experts_given, bool topk_given);

/// Measures one of names(); "layer" gives one or two rows. The same on every rank.
/// Collective. Throws as what it calls.
std::vector<Row> measure(const std::string& what, const Context& context, const Options& options);

std::vector<Row> measure_barrier(const Parallel& ranks, const Options& options);
std::vector<Row> measure_dispatch(const Parallel& ranks, const Options& options);
std::vector<Row> measure_combine(const Parallel& ranks, const Options& options);
std::vector<Row> measure_experts(const Parallel& ranks, const Options& options);
std::vector<Row> measure_layer(const Parallel& ranks, const Options& options);

}  // namespace expar::bench
