// Ranks that are processes of one host.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include <expar/transport.h>

namespace expar::shm {

/// What this machine lacks of what the transport needs; empty where it lacks nothing.
std::string missing();

struct Membership {
  std::string job;  // the same for all ranks of this job and no other job of this user on this host
  int rank = 0;
  int size = 1;
  /// Off: ranks do not address each other's memory.
  bool mapping = true;
};

/// Meets the other processes of the job and returns this rank's transport, which leaves no name anywhere.
/// `timeout` also limits how long map() waits for a peer's memory. Collective.
/// Throws Error, the same on every rank that came: bad_argument (two processes of one rank), mismatch (ranks that
/// disagree on the job), timeout (naming the ranks that did not come), peer_lost, io, no_memory, unsupported.
std::unique_ptr<Transport> connect(const Membership& membership, std::chrono::nanoseconds timeout);

}  // namespace expar::shm
