// What every call needs to know about where it runs: the ranks, the kernels, the threads.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include <expar/communicator.h>
#include <expar/kernels.h>
#include <expar/pool.h>

namespace expar {

class StoreChoice;

/// A queue of work on a device. The CPU has none; the field keeps signatures the same for those that do.
struct Stream {
  void* handle = nullptr;
};

struct ContextOptions {
  /// Worker threads of this rank. 0: max(1, available_cores().usable() / ranks of the communicator).
  int threads = 0;
  /// "cpu" or "reference"; see registry.h.
  std::string backend = "cpu";
};

/// Passed to every call. A cheap handle: copies share the communicator and the pool.
class Context {
 public:
  /// Ranks agree on the best instruction set that all of them have, EXPAR_ISA being the best of its rank.
  /// Collective. Throws Error: unsupported (no such backend or EXPAR_ISA here; no instruction set in common),
  /// bad_argument (threads below 0), as meet(); on a rank alone no_memory (the system refuses a thread).
  /// Cost: one meeting.
  explicit Context(Communicator communicator, const ContextOptions& options = {});

  /// The same context with another limit on how long one call may wait. Throws Error: bad_argument (not above 0).
  Context with_timeout(std::chrono::nanoseconds timeout) const;
  /// The same context for a rank that cannot take part, see Communicator::declining.
  Context declining(const Error& error) const;
  bool declines() const { return communicator_.declines(); }
  /// Runs `work`, which this rank does alone before the ranks meet, unless this context declines already. Returns this
  /// context, which declines with what `work` threw: every rank throws that where they meet next.
  Context attempt(FunctionRef<void()> work) const;
  /// The same kernels, threads, memory and limit for a group of these ranks (Communicator::split). Not collective.
  /// Throws Error: bad_argument (this rank is in no group: the handle is empty).
  Context on(const Communicator& group) const;

  const Communicator& communicator() const { return communicator_; }
  int rank() const { return communicator_.rank(); }
  int size() const { return communicator_.size(); }
  const Kernels& kernels() const { return *kernels_; }
  Pool& pool() const { return *pool_; }
  Stream stream() const { return stream_; }
  /// What this rank's time is recorded in, see Communicator::record; null where it is not.
  Trace* trace() const { return communicator_.trace(); }
  /// The communicator's.
  const std::shared_ptr<std::pmr::memory_resource>& memory() const { return communicator_.memory(); }
  /// What this rank has learnt of how to store rows; for the library's own use.
  StoreChoice& stores() const { return *stores_; }

 private:
  Communicator communicator_;
  std::shared_ptr<const Kernels> kernels_;
  std::shared_ptr<Pool> pool_;
  std::shared_ptr<StoreChoice> stores_;
  Stream stream_;
};

}  // namespace expar
