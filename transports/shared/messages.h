// What is open of one rank's messages, however their bytes travel: tickets, and the check that both ends agree.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include <expar/transport.h>

namespace expar::local {

class Messages {
 public:
  using Ticket = Transport::Ticket;

  Messages(int rank, int size) : rank_(rank), size_(size) {}
  virtual ~Messages() = default;

  /// Posts, and sends or receives what can be now. Throws Error: internal (no such peer), as advance().
  Ticket start(std::span<const Message> messages);
  /// True once, when all messages of the ticket have completed.
  bool take_complete(Ticket ticket);
  /// True while nothing is in flight: advance() would find nothing to do.
  bool idle() const { return in_flight_ == 0; }
  /// Moves bytes; true if any moved. Throws Error: mismatch (the ends disagree on a size), internal (what came cannot
  /// be).
  virtual bool advance() = 0;

 protected:
  int rank() const { return rank_; }
  /// Takes `message` in hand, until it is complete.
  virtual void post(const Message& message, Ticket ticket) = 0;
  /// One message of `ticket` is done.
  void complete(Ticket ticket);
  /// `receive` gets `bytes` from its peer. Throws Error: mismatch.
  void check_size(const Message& receive, std::size_t bytes) const;

 private:
  struct Open {
    Ticket ticket;
    std::size_t left;
  };

  int rank_;
  int size_;
  std::vector<Open> open_;
  std::size_t in_flight_ = 0;
  Ticket next_ = 1;
};

}  // namespace expar::local
