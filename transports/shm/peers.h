// Watches over the other processes of a job.
#pragma once

#include <poll.h>
#include <sys/types.h>

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "transports/shared/job_memory.h"
#include "transports/shm/fd.h"

namespace expar::shm {

/// Two witnesses per peer, because each has a blind spot: its socket hangs up when it dies (but not while a child that
/// it forked holds a copy), and its pidfd becomes readable (but does not exist on old kernels, nor where the peers'
/// process numbers mean nothing).
class Peers {
 public:
  Peers() = default;
  Peers(int self, std::vector<Fd> mesh, std::span<const pid_t> pids);

  int socket(int peer) const { return mesh_[static_cast<std::size_t>(peer)].get(); }
  bool empty() const { return watched_.empty(); }
  /// A rank that died; those that said they leave are no longer watched. Cost: one poll().
  std::optional<int> find_dead(const local::JobMemory& job);
  std::string trace(int peer) const;

 private:
  std::vector<Fd> mesh_;
  std::vector<Fd> processes_;  // pidfds, by rank
  std::vector<pid_t> pids_;
  std::vector<pollfd> watched_;
  std::vector<int> rank_of_;  // of each entry of watched_
};

}  // namespace expar::shm
