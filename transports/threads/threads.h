// Ranks that are threads of one process: the reference transport.
#pragma once

#include <memory>
#include <optional>

#include <expar/transport.h>

namespace expar::threads {

/// What the ranks of one job share. A handle: copies are the same job, and its transports keep it alive.
class ThreadsJob {
 public:
  /// `mapping` off: ranks do not address each other's memory, as if they were far apart.
  /// Throws Error: bad_argument (ranks < 1), no_memory.
  explicit ThreadsJob(int ranks, bool mapping = true);

  /// The transport of `rank`, once per rank; to be used by one thread at a time.
  std::unique_ptr<Transport> transport(int rank) const;

  /// Sets the job's cause on behalf of `rank`, from its thread; returns the one in force.
  Error abort(int rank, const Error& cause) const;
  std::optional<Error> failure() const;

 private:
  friend class ThreadsTransport;
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace expar::threads
