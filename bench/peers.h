// Plain copies and plain reads between ranks: what dispatch and combine are compared with.
#pragma once

#include <cstdint>
#include <vector>

#include "bench/limits.h"
#include "bench/workload.h"

namespace expar::bench {

/// A piece of every rank's memory, where this rank can address it.
class PeerMemory {
 public:
  /// Shows `block` of this rank to the others and finds theirs. Collective.
  PeerMemory(const Context& context, const Block& block);
  /// False if some rank cannot address another: then nothing can be compared. The same on every rank.
  bool complete() const { return complete_; }
  std::byte* of(int rank) const { return memory_[static_cast<std::size_t>(rank)]; }

 private:
  std::vector<std::byte*> memory_;
  bool complete_ = false;
};

/// Copies the rows that a dispatch of `plan` sends to other ranks, to the same ranks and nothing else.
class CopyProbe {
 public:
  /// Collective.
  CopyProbe(const Context& context, ConstTensor x, const Plan& plan);
  bool possible() const { return peers_.complete(); }
  /// The reader uses what the last copy brought.
  void use();
  void copy();

 private:
  Context context_;
  ConstTensor x_;
  Plan plan_;
  Block block_;
  PeerMemory peers_;
  std::uint64_t used_ = 0;
};

/// Reads, where they lie, the rows that a combine of `plan` sums, this rank's own among them, each once and nothing
/// else.
class FetchProbe {
 public:
  /// Collective. `y` stays alive and in its place.
  FetchProbe(const Context& context, const Plan& plan, const Outbox& y);
  bool possible() const { return peers_.complete(); }
  void read();

 private:
  Context context_;
  Plan plan_;
  std::size_t row_bytes_;
  PeerMemory peers_;
  std::uint64_t used_ = 0;
};

/// Reads `bytes` at `data`, as a kernel that uses them would.
std::uint64_t use_memory(const void* data, std::size_t bytes);

}  // namespace expar::bench
