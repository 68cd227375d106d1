// Messages of one rank over the rings: several in flight, matched by peer and tag in the order of their starts.
//
// A message is a header and its bytes in the pair's stream, so one larger than the ring passes through it in pieces.
// One that comes before its receive is posted waits in the ring; only where a posted receive lies behind it is it
// taken aside, so that no order of posting can block, and a rank that never receives holds its sender up instead of
// filling memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include <expar/transport.h>

#include "transports/shared/ring.h"

namespace expar::local {

class Messages {
 public:
  using Ticket = Transport::Ticket;

  Messages(const JobMemory& job, int rank);

  /// Posts, and sends or receives what can be now. Throws like advance().
  Ticket start(std::span<const Message> messages);
  /// True once, when all messages of the ticket have completed.
  bool take_complete(Ticket ticket);
  /// True while nothing is in flight: advance() would find nothing to do.
  bool idle() const { return in_flight_ == 0; }
  /// Moves bytes; true if any moved. Throws Error: mismatch (the ends disagree on a size), internal (a damaged ring).
  bool advance();

 private:
  struct Send {
    Message message;
    Ticket ticket;
    bool header_sent = false;
    std::size_t sent = 0;
  };
  struct Receive {
    Message message;
    Ticket ticket;
  };
  /// The message at the front of a peer's stream, once its header is read.
  struct Incoming {
    std::uint64_t tag = 0;
    std::size_t bytes = 0;
    std::size_t received = 0;
    std::optional<Receive> target;  // none: taken aside
  };
  struct Aside {
    std::uint64_t tag = 0;
    std::vector<std::byte> data;
    bool complete = false;
  };
  struct Peer {
    Peer(const JobMemory& job, int self, int peer) : out(job, self, peer), in(job, peer, self) {}
    RingWriter out;
    RingReader in;
    std::deque<Send> sends;
    std::deque<Receive> receives;  // posted and not matched
    std::optional<Incoming> incoming;
    std::deque<Aside> aside;
  };
  struct Open {
    Ticket ticket;
    std::size_t left;
  };

  bool advance_self(Peer& self);
  bool advance_sends(Peer& peer, int to);
  bool advance_receives(Peer& peer, int from);
  bool begin_incoming(Peer& peer);
  bool match_aside(Peer& peer);
  void check_size(const Receive& receive, std::size_t bytes) const;
  void complete(Ticket ticket);

  JobMemory job_;
  int rank_;
  std::vector<Peer> peers_;
  std::vector<Open> open_;
  std::size_t in_flight_ = 0;
  Ticket next_ = 1;
};

}  // namespace expar::local
