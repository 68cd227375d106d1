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

#include "transports/shared/messages.h"
#include "transports/shared/ring.h"

namespace expar::local {

class RingMessages final : public Messages {
 public:
  RingMessages(const JobMemory& job, int rank);
  /// Throws Error: mismatch, internal (a damaged ring).
  bool advance() override;

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

  void post(const Message& message, Ticket ticket) override;
  bool advance_self(Peer& self);
  bool advance_sends(Peer& peer, int to);
  bool advance_receives(Peer& peer, int from);
  bool begin_incoming(Peer& peer);
  bool match_aside(Peer& peer);

  JobMemory job_;
  std::vector<Peer> peers_;
};

}  // namespace expar::local
