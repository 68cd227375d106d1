// poll() over the sockets and pidfds of all peers.
#include "transports/shm/peers.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace expar::shm {

Peers::Peers(int self, std::vector<Fd> mesh, std::span<const pid_t> pids)
    : mesh_(std::move(mesh)), processes_(mesh_.size()), pids_(pids.begin(), pids.end()) {
  for (int peer = 0; peer < static_cast<int>(mesh_.size()); ++peer) {
    if (peer == self) continue;
    const auto i = static_cast<std::size_t>(peer);
    watched_.push_back({mesh_[i].get(), 0, 0});  // hangups are reported without being asked for
    rank_of_.push_back(peer);
    if (pids_[i] <= 0 || pids_[i] == getpid()) continue;
    // If the process has died already this fails, or finds a stranger of the same number: the socket tells then.
    processes_[i] = Fd(static_cast<int>(syscall(SYS_pidfd_open, pids_[i], 0)));
    if (!processes_[i]) continue;
    watched_.push_back({processes_[i].get(), POLLIN, 0});
    rank_of_.push_back(peer);
  }
}

std::optional<int> Peers::find_dead(const local::JobMemory& job) {
  if (watched_.empty() || poll(watched_.data(), watched_.size(), 0) <= 0) return std::nullopt;
  for (std::size_t i = 0; i < watched_.size(); ++i) {
    if (watched_[i].fd < 0 || watched_[i].revents == 0) continue;
    // A rank that leaves says so before it closes anything: this hangup is no death.
    const local::Presence presence = job.of(rank_of_[i]).presence.load();
    if (presence != local::Presence::left && presence != local::Presence::left_in_exception) return rank_of_[i];
    watched_[i].fd = -1;
  }
  return std::nullopt;
}

std::string Peers::trace(int peer) const {
  const pid_t pid = pids_[static_cast<std::size_t>(peer)];
  return pid > 0 ? "process " + std::to_string(pid) : std::string();
}

}  // namespace expar::shm
