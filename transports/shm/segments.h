// The segments of a rank and of its peers: making them, handing them over, mapping them.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include <expar/transport.h>

#include "transports/shared/pages.h"
#include "transports/shm/fd.h"
#include "transports/shm/peers.h"

namespace expar::shm {

class Segments {
 public:
  Segments(int self, int size) : self_(self), outgoing_(size_of(size)), incoming_(size_of(size)) {}

  /// Makes a segment and queues it for every peer. Throws Error: no_memory, io.
  Segment grow(std::size_t bytes, bool shared);
  /// Sends what is queued, as far as the sockets take it. Never blocks.
  void flush(const Peers& peers);
  /// Takes in what `peer` has sent. Never blocks. Throws Error: internal (memory that is not safe to map), no_memory.
  void receive(const Peers& peers, int peer);
  /// A segment of any rank that is here; empty if it is not. The first call for a segment touches all its pages.
  std::span<std::byte> find(int rank, std::uint32_t id);

 private:
  struct Announcement {
    std::uint64_t id;
    std::uint64_t bytes;
  };
  struct Outgoing {
    Announcement announcement;
    std::shared_ptr<const Fd> file;
  };
  struct Mapped {
    local::Pages pages;
    bool touched = false;
  };
  static std::size_t size_of(int size) { return static_cast<std::size_t>(size); }

  int self_;
  std::vector<std::deque<Outgoing>> outgoing_;  // by peer
  std::vector<std::deque<Mapped>> incoming_;    // by rank, this one included, then id
  bool queued_ = false;
};

}  // namespace expar::shm
