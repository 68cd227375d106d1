// What the machine can do at most, on all threads of a rank: loops that compute or read and nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <expar/expar.h>

#include "bench/loops.h"

namespace expar::bench {

/// Memory of this rank that is read at full speed by all its threads, again and again.
class ReadProbe {
 public:
  /// `bytes` are rounded up to a MiB and cut at a size that no cache holds.
  ReadProbe(const Context& context, std::int64_t bytes);
  void run();
  double bytes() const { return static_cast<double>(memory_.view().byte_size()); }

 private:
  Context context_;
  Loops loops_;
  Array memory_;
  std::vector<std::uint64_t> sums_;
};

/// Memory of this rank that is copied by all its threads, again and again.
class MemcpyProbe {
 public:
  /// As ReadProbe, twice.
  MemcpyProbe(const Context& context, std::int64_t bytes);
  void run();
  /// Copied by one run().
  double bytes() const { return static_cast<double>(from_.view().byte_size()); }

 private:
  Context context_;
  Array from_, to_;
};

/// About a millisecond of arithmetic on all threads of this rank.
class ComputeProbe {
 public:
  ComputeProbe(const Context& context, DType dtype);
  void run();
  /// Of one run(), all threads together.
  double flops() const { return flops_; }

 private:
  Context context_;
  double (*loop_)(std::int64_t rounds, float* sink);
  std::vector<float> sinks_;
  std::int64_t rounds_ = 0;
  double flops_ = 0;
};

}  // namespace expar::bench
