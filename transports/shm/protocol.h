// What is said at the rendezvous, and the sockets it is said over.
#pragma once

#include <sys/un.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include <expar/error.h>
#include <expar/transport.h>

#include "src/util/cores.h"
#include "transports/shm/fd.h"
#include "transports/shm/rendezvous.h"

namespace expar::shm {

/// Which processes a process number can mean: a number that was read in one namespace names a stranger in another.
struct PidNamespace {
  std::uint64_t device = 0;
  std::uint64_t inode = 0;

  /// That of this process; all zero where /proc does not tell.
  static PidNamespace own();
  bool known() const { return inode != 0; }
  bool operator==(const PidNamespace&) const = default;
};

/// A guest to rank 0, first.
struct Hello {
  static constexpr std::uint64_t kMagic = 0x7261707865;  // "expar"
  static constexpr std::uint32_t kVersion = 2;
  std::uint64_t magic = kMagic;
  std::uint32_t version = kVersion;
  std::int32_t rank = 0;
  std::int32_t size = 0;
  std::uint32_t mapping = 0;
  std::uint64_t layout = 0;  // of the shared memory: differs where builds do
  CoreSet cores{};
  PidNamespace pids{};
};

/// A guest to rank 0, when it has all it needs.
struct Ready {
  std::uint64_t magic = Hello::kMagic;
};

/// Rank 0 to a guest: memory, then peers (itself included), then go; or a refusal at any time.
struct Reply {
  enum class Kind : std::uint32_t { memory, peer, go, refusal };
  Kind kind = Kind::memory;
  std::int32_t peer = -1;        // peer: whose socket comes along; refusal: Error::peer
  std::int32_t pid = 0;          // peer; 0 where it would mean nothing to the guest
  std::uint32_t cores = 0;       // memory
  std::uint32_t code = 0;        // refusal
  std::int32_t rank = -1;        // refusal: Error::rank
  std::array<char, 512> text{};  // refusal
};

/// The user and process at the other end of a socket, as the kernel knows them.
struct Credentials {
  uid_t user;
  pid_t pid;
};
Credentials credentials(int socket);

/// The abstract address of a job's rendezvous.
struct Address {
  explicit Address(const std::string& job);
  sockaddr_un name{};
  socklen_t bytes = 0;
};

/// A SOCK_SEQPACKET socket that is closed on exec and never blocks. Throws Error: io.
Fd make_socket();

/// Tells apart builds whose shared memory is laid out differently.
std::uint64_t layout_of_memory();
/// The size of the job's memory.
std::size_t bytes_of_memory(const Membership& self);

/// "rank 1"
std::string name_of(int rank);
/// "job 'x'"
std::string name_of(const std::string& job);

Error joining(ErrorCode code, const std::string& message, int rank = -1, int peer = -1);

/// Rank 0: gathers and hands out. Nothing if another process listens at the address.
std::optional<Meeting> host(const Membership& self, Deadline deadline, std::chrono::nanoseconds timeout);
/// The others: joins whoever listens. Nothing if nobody does (yet).
std::optional<Meeting> join_host(const Membership& self, Deadline deadline, std::chrono::nanoseconds timeout);

}  // namespace expar::shm
