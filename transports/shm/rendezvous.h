// How the processes of a job find each other on one host, and what they leave the meeting with.
//
// Rank 0 listens on an abstract Unix socket named by user and job; the others connect and say who they are. Both sides
// check the user on the other end. When all are there, rank 0 hands everyone the memory of the job and one socket to
// each other rank. Nobody leaves before all have what they need, or all with the same error.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <vector>

#include "transports/shm/fd.h"
#include "transports/shm/shm.h"

namespace expar::shm {

struct Meeting {
  Fd memory;                // of the whole job, sealed; its size is known from the others of these numbers
  std::vector<Fd> mesh;     // by rank: a socket to each other rank
  std::vector<pid_t> pids;  // by rank; 0 where it is not known, or is a number of another pid namespace
  int cores = 1;            // that the ranks share
};

/// For jobs of more than one rank. Throws Error, the same on every rank that came: timeout (naming the ranks that did
/// not), bad_argument or mismatch (two processes of the same rank; ranks that disagree on the job), peer_lost, io,
/// no_memory.
Meeting meet(const Membership& self, std::chrono::nanoseconds timeout);

}  // namespace expar::shm
