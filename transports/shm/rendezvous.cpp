// Finding the meeting point, and what both sides of it need.
#include "transports/shm/rendezvous.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <system_error>
#include <thread>

#include "transports/shared/job_memory.h"
#include "transports/shared/pages.h"
#include "transports/shared/wording.h"
#include "transports/shm/protocol.h"

namespace expar::shm {
namespace {

// Ids that do not fit into an address are told apart by 128 bits of them (FNV-1a, from both ends).
std::string short_form(const std::string& id) {
  constexpr std::size_t kLongest = 64;
  if (id.size() <= kLongest) return id;
  constexpr std::uint64_t kPrime = 0x100000001b3;
  std::uint64_t forwards = 0xcbf29ce484222325;
  std::uint64_t backwards = forwards;
  for (std::size_t i = 0; i < id.size(); ++i) {
    forwards = (forwards ^ static_cast<unsigned char>(id[i])) * kPrime;
    backwards = (backwards ^ static_cast<unsigned char>(id[id.size() - 1 - i])) * kPrime;
  }
  return std::to_string(forwards) + "-" + std::to_string(backwards);
}

}  // namespace

Address::Address(const std::string& job) {
  const std::string text = "expar-" + std::to_string(geteuid()) + "-" + short_form(job);
  name.sun_family = AF_UNIX;
  // The zero in front makes it abstract: no file, gone with the last process that holds it.
  std::memcpy(name.sun_path + 1, text.data(), text.size());
  bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
}

Fd make_socket() {
  Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) throw joining(ErrorCode::io, "cannot make a socket: " + std::generic_category().message(errno));
  return socket;
}

Credentials credentials(int socket) {
  ucred peer{};
  socklen_t bytes = sizeof peer;
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) {
    throw joining(ErrorCode::io, "cannot tell who is at the other end of a socket");
  }
  return {peer.uid, peer.pid};
}

PidNamespace PidNamespace::own() {
  struct stat status {};
  if (stat("/proc/self/ns/pid", &status) != 0) return {};
  return {status.st_dev, status.st_ino};
}

std::uint64_t layout_of_memory() {
  return local::JobMemory::bytes(3, 4096) * 1'000'003 + sizeof(local::RankArea) * 257 + kBoardLines;
}

std::size_t bytes_of_memory(const Membership& self) {
  const std::size_t ring_bytes = local::JobMemory::ring_bytes(self.size, self.mapping);
  return local::whole_pages(local::JobMemory::bytes(self.size, ring_bytes));
}

std::string name_of(int rank) { return "rank " + std::to_string(rank); }
std::string name_of(const std::string& job) { return "job '" + job + "'"; }

Error joining(ErrorCode code, const std::string& message, int rank, int peer) {
  return Error(code, message, {rank, peer, "join"});
}

Meeting meet(const Membership& self, std::chrono::nanoseconds timeout) {
  const Deadline start = Clock::now();
  const Deadline deadline = timeout > Deadline::max() - start ? Deadline::max() : start + timeout;
  for (auto pause = std::chrono::microseconds(500);; pause = std::min(2 * pause, std::chrono::microseconds(5000))) {
    if (self.rank == 0) {
      if (auto meeting = host(self, deadline, timeout)) return std::move(*meeting);
    }
    // A second rank 0 goes there too, and is told so.
    if (auto meeting = join_host(self, deadline, timeout)) return std::move(*meeting);
    if (Clock::now() >= deadline) {
      throw joining(ErrorCode::timeout,
                    name_of(self.rank) + " has waited " + local::seconds(timeout) + " for rank 0 of " +
                        name_of(self.job) + " to start on this host",
                    self.rank, self.rank == 0 ? -1 : 0);
    }
    std::this_thread::sleep_for(pause);
  }
}

}  // namespace expar::shm
