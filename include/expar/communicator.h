// Ranks that work together: who they are, the memory they show each other, their limit of patience.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <memory_resource>
#include <span>
#include <string_view>

#include <expar/transport.h>

namespace expar {

class Arena;
class Operation;
struct Group;

/// Where a block lies, as a peer sees it.
struct BlockRef {
  std::uint32_t segment = 0;
  std::uint64_t offset = 0;
};

/// A piece of this rank's arena; move-only. The destructor gives it back: the memory is used again only after every
/// peer that may touch it has completed the operations it was shown in (Operation::show).
class Block {
 public:
  Block() = default;
  ~Block();
  Block(Block&&) noexcept;
  Block& operator=(Block&&) noexcept;

  std::byte* data() const { return bytes_.data(); }
  std::size_t size() const { return bytes_.size(); }
  BlockRef ref() const { return ref_; }

 private:
  friend class Arena;
  friend class Operation;
  std::shared_ptr<Arena> arena_;
  std::shared_ptr<const Group> shown_to_;
  BlockRef ref_;
  std::span<std::byte> bytes_;
  std::uint64_t last_use_ = 0;
};

/// How long a call may wait where nobody says otherwise: EXPAR_TIMEOUT (seconds), else 120 s.
/// Throws Error: bad_argument (EXPAR_TIMEOUT is not a number above 0).
std::chrono::nanoseconds default_timeout();

/// A set of ranks. A cheap handle: copies are the same communicator. One thread at a time uses it. An empty handle has
/// no ranks: only its assignment, its destruction and the test for it are allowed.
/// After `timeout` or `peer_lost`, and after abort(), every later call throws the same error and destructors do not
/// wait.
class Communicator {
 public:
  Communicator() = default;
  /// `timeout`: how long a call may wait; 0 is default_timeout(). Throws Error: bad_argument (below 0).
  explicit Communicator(std::unique_ptr<Transport> transport, std::chrono::nanoseconds timeout = {});
  explicit operator bool() const { return state_ != nullptr; }

  int rank() const;
  int size() const;
  /// The rank of the whole job that is `rank` here, which is what errors name; another number only in a group.
  int job_rank(int rank) const;
  std::string_view transport_name() const;
  /// How long one call on this handle may wait.
  std::chrono::nanoseconds timeout() const { return timeout_; }
  /// The same communicator with another limit. Throws Error: bad_argument (not above 0).
  Communicator with_timeout(std::chrono::nanoseconds timeout) const;

  /// The same communicator for a rank that cannot take part in what the others are about to start: an operation on this
  /// handle prepares nothing, and every rank throws the error of the lowest rank that declines or fails in it. The
  /// communicator stays usable.
  Communicator declining(const Error& error) const;
  bool declines() const { return refusal_ != nullptr; }

  /// The ranks that name the same `group` become a communicator of their own, ordered by `key`, then by rank; -1 joins
  /// none and gets an empty handle. A group shares the job's memory and its fate: what ends the job ends it for all.
  /// Operations of several communicators may be in flight at once; where ranks share more than one of them, they start
  /// the operations of all in one order.
  /// Collective over this communicator. A rank is in at most 15 groups; one counts until its last handle has gone.
  /// Throws Error: bad_argument (group below -1, or too many groups), as meet(). Cost: one meeting.
  Communicator split(int group, int key = 0) const;

  /// Ends the job with a cause of the user's own: every rank's next or current call throws Error internal with this
  /// message and this rank. Not collective.
  void abort(std::string_view message) const;

  /// From here on what this rank does and waits for becomes spans of `trace`, in all communicators of the job; null
  /// ends it. Not collective.
  void record(std::shared_ptr<Trace> trace) const;
  /// Null where nothing is recorded.
  Trace* trace() const;

  /// From here on waiting calls ask `asked` at least every 50 ms, in all communicators of the job; where it says true,
  /// the job ends with the error internal "was interrupted", which names this rank. Empty ends it. Not collective.
  void interrupt_by(std::function<bool()> asked) const;

  // ---- for authors of collectives

  /// The job's, which knows ranks by their job_rank().
  Transport& transport() const;
  /// True if this rank can address the blocks of `peer`.
  bool mapped(int peer) const;
  /// A block that the ranks of this communicator are shown: 64-byte aligned, with whatever its last user left. Takes
  /// memory from the system only where none of what was given back fits. Throws Error: no_memory, the job's cause.
  Block allocate(std::size_t bytes) const;
  /// Bytes that blocks have taken from the system so far, for the job and all its groups.
  std::size_t arena_bytes() const;
  /// Host memory for what calls need for a while: given back, it serves the next call. Safe from any thread; what
  /// outlives the communicator keeps it.
  const std::shared_ptr<std::pmr::memory_resource>& memory() const;
  /// transport().wait, while all operations of this rank that are in flight advance; `waiting.peer` is a rank of the
  /// job. Throws as that, and what they throw as they advance.
  void wait(FunctionRef<bool()> done, const Waiting& waiting) const;
  /// Sets the job's cause and throws the one in force.
  [[noreturn]] void fail(const Error& cause) const;
  /// The same, where the cause is what a rank of this communicator did: "rank 3 sent counts that cannot be".
  [[noreturn]] void blame(int peer, std::string_view operation, std::string_view did,
                          ErrorCode code = ErrorCode::internal) const;
  /// Throws `error`, which every rank has found alike in what all of them showed. Its ranks are those of this
  /// communicator; what is thrown names them as the job does.
  [[noreturn]] void throw_alike(const Error& error) const;

 private:
  friend class Operation;
  struct State;
  Communicator(std::shared_ptr<State> state, std::chrono::nanoseconds timeout)
      : state_(std::move(state)), timeout_(timeout) {}
  std::shared_ptr<State> state_;
  std::chrono::nanoseconds timeout_{0};
  std::shared_ptr<const Error> refusal_;  // null: this rank takes part
};

}  // namespace expar
