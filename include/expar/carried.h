// Ranks that share no memory, and whose bytes somebody else carries: MPI, a ProcessGroup, sockets, a test.
//
// The user supplies an ordered, reliable way for frames of bytes to reach each peer. All else (what ranks show,
// waiting, how a job ends, messages) is written here, once.
#pragma once

#include <cstddef>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include <expar/transport.h>

namespace expar {

namespace carried {
class Link;
}

/// Where the frames go that have come for one rank. A cheap handle, for any thread, at any time: once the rank has
/// left, what is delivered is dropped.
class Deliveries {
 public:
  explicit Deliveries(std::shared_ptr<carried::Link> link) : link_(std::move(link)) {}

  /// A frame of `peer` has come. Frames of one peer are delivered one at a time, in the order they were sent in.
  /// Nothing in a frame is trusted: one that cannot be ends the job with an error internal that names the peer. Never
  /// waits for the rank; keeps a message until the rank receives it, however much that is. Throws Error: bad_argument
  /// (`peer` is no other rank).
  void deliver(int peer, std::vector<std::byte> frame) const;

  /// Nothing more will come from `peer`, and `why`, in a few words: "its connection was closed". Not at the same time
  /// as a frame of it. Unless it has left before, it counts as dead: whoever waits throws peer_lost within 50 ms.
  /// Throws Error: bad_argument (`peer` is no other rank).
  void lost(int peer, std::string_view why) const;

  /// This rank leaves: for a process that ends while its transport is still there. What it shows or sends after is
  /// dropped.
  void leave() const;

 private:
  std::shared_ptr<carried::Link> link_;
};

/// Carries the frames of one rank. Its functions are called by the rank and by the threads that deliver to it, also at
/// the same time.
class Carrier {
 public:
  virtual ~Carrier() = default;

  /// Called once, before all else: what peers send to this rank goes `to` there from now on. Frames that come before
  /// are kept until then.
  virtual void open(const Deliveries& to) = 0;

  /// Queues `frame` for `peer`, another rank, and returns: must not wait for the peer. Frames to one peer arrive whole,
  /// each once, in the order of these calls. What cannot be sent any more is dropped; an exception makes the peer lost.
  virtual void send(int peer, std::vector<std::byte> frame) = 0;

  /// The job fails on this rank with `cause`. Returns the error that is to be the cause on all ranks, the same on each
  /// that asks: the first that any of them came with. The default has nobody to ask: ranks that fail at the same time,
  /// before they hear of each other, throw different errors then. May take as long as asking takes; after an exception
  /// `cause` counts.
  virtual Error settle(const Error& cause) { return cause; }

  /// The rank leaves, in good order or because the job has `failed`. What is queued should still be sent; to see to
  /// that this may wait a little in good order, and should not else. A frame that comes after is dropped, and so is an
  /// exception.
  virtual void close(bool failed) { static_cast<void>(failed); }
};

/// The transport of `rank`, one of `size`, whose frames `carrier` carries; `name` is a literal, or outlives the
/// transport. No peer is mapped. The carrier is let go when the rank leaves.
/// Not collective: ranks may come at any time. Throws Error: bad_argument (no such rank), no_memory, and what
/// carrier->open() does.
/// Cost: 200 kB of memory for each rank; each line shown is P - 1 frames, each message is copied twice.
std::unique_ptr<Transport> make_carried(std::string_view name, int rank, int size, std::shared_ptr<Carrier> carrier);

}  // namespace expar
