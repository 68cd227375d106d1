// Messages of one rank that come as frames: matched by peer and tag, in the order of their starts.
//
// Who delivers only leaves a frame here. The rank itself copies it to where it was asked for, so that nobody writes to
// memory that the rank has let go of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "transports/carried/frame.h"
#include "transports/shared/messages.h"

namespace expar::carried {

/// Whose message, and which.
struct Key {
  int peer;
  std::uint64_t tag;
  auto operator<=>(const Key&) const = default;
};

/// A message that has come; its bytes are the frame's from `offset` on.
struct Letter {
  Key key;
  Frame frame;
  std::size_t offset;
};

/// What has been delivered and not yet looked at. For any thread.
class Letters {
 public:
  void add(Letter letter);
  std::vector<Letter> take_all();

 private:
  std::mutex mutex_;
  std::vector<Letter> letters_;  // guarded by mutex_
};

class Mailbox final : public local::Messages {
 public:
  /// `come` is where letters of all ranks are left, this one included; `send` takes a frame to another rank.
  Mailbox(int rank, int size, Letters& come, std::function<void(int peer, Frame frame)> send)
      : Messages(rank, size), come_(come), send_(std::move(send)) {}
  /// Throws Error: mismatch.
  bool advance() override;

 private:
  struct Receive {
    Message message;
    Ticket ticket;
  };

  void post(const Message& message, Ticket ticket) override;
  void hand_over(const Letter& letter, const Receive& receive);

  Letters& come_;
  std::function<void(int, Frame)> send_;
  // What waits for its other end; of one key never both.
  std::map<Key, std::deque<Letter>> letters_;
  std::map<Key, std::deque<Receive>> receives_;
};

}  // namespace expar::carried
