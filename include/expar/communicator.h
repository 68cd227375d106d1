// Ranks that work together: their order of operations, their memory, their limit of patience.
//
// Communicator is what users hold. Blocks and Operation are for those who write a collective of their own:
// dispatch, combine and every collective of the library are written on them and on nothing else.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <expar/transport.h>

namespace expar {

class Arena;
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

/// What all ranks must agree on when they start an operation: its name and a few numbers. At most 24 numbers.
class Signature {
 public:
  explicit Signature(std::string_view operation) : operation_(operation) {}
  Signature& with(std::string_view field, std::int64_t value);
  Signature& with_real(std::string_view field, double value);
  /// Shown as one number.
  Signature& with_list(std::string_view field, std::span<const std::int64_t> values);
  std::string_view operation() const { return operation_; }
  std::uint64_t hash() const;
  std::string str() const;  // "dispatch (hidden 64, dtype 1)"

 private:
  struct Field {
    std::string_view name;
    std::int64_t value;  // or the bits of a double
    bool is_real = false;
  };
  std::string_view operation_;
  std::array<Field, 24> fields_{};
  std::size_t count_ = 0;
};

/// Work that a rank owes its peers and does while it waits for something else.
class InFlight {
 public:
  virtual ~InFlight() = default;
  /// Does what can be done now, without waiting.
  virtual void advance() = 0;
};

/// How long a call may wait where nobody says otherwise: EXPAR_TIMEOUT (seconds), else 120 s.
/// Throws Error: bad_argument (EXPAR_TIMEOUT is not a number above 0).
std::chrono::nanoseconds default_timeout();

/// A set of ranks. A cheap handle: copies are the same communicator. One thread at a time uses it.
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
  /// Throws Error: bad_argument (group below -1, or too many groups), mismatch, timeout, peer_lost. Cost: one meeting.
  Communicator split(int group, int key = 0) const;

  /// Ends the job with a cause of the user's own: every rank's next or current call throws Error internal with this
  /// message and this rank. Not collective.
  void abort(std::string_view message) const;

  /// From here on what this rank does and waits for becomes spans of `trace`; null ends it. Not collective.
  void record(std::shared_ptr<Trace> trace) const;
  /// Null where nothing is recorded.
  Trace* trace() const;

  // ---- for authors of collectives

  /// The job's, which knows ranks by their job_rank().
  Transport& transport() const;
  /// True if this rank can address the blocks of `peer`.
  bool mapped(int peer) const;
  /// A block that the ranks of this communicator are shown: 64-byte aligned, with whatever its last user left. Takes
  /// memory from the system only where none of what was given back fits. Throws Error: no_memory.
  Block allocate(std::size_t bytes) const;
  /// Bytes that blocks have taken from the system so far, for the job and all its groups.
  std::size_t arena_bytes() const;
  /// Host memory for what calls need for a while: given back, it serves the next call. Safe from any thread; what
  /// outlives the communicator keeps it.
  const std::shared_ptr<std::pmr::memory_resource>& memory() const;
  /// transport().wait with a peer of the job, while the other operations in flight on this communicator advance.
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

/// One collective in progress on this rank. All ranks construct the same operations in the same order; up to 64 may be
/// in progress on a communicator, 8 on a group of it, beyond which the job ends.
///
/// Two meeting points: `ready` (I have started, here is what you need from me) and `done` (you have all you get from
/// me). A rank that cannot start says why in its ready, and every rank throws that error at meet(), before bytes move:
/// the communicator stays usable. Destroying an operation before complete() ends the job.
class Operation {
 public:
  using Words = std::array<std::uint64_t, 5>;

  /// Takes the next sequence number. Throws the job's cause if there is one.
  Operation(const Communicator& communicator, const Signature& signature);
  ~Operation();
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  const Communicator& communicator() const { return communicator_; }
  std::string_view name() const { return signature_.operation(); }
  /// No other operation of the job whose ranks include one of these has this number: a tag for messages.
  std::uint64_t number() const;

  /// The words of a ready that shows `block`, which peers may touch from then on until they have completed this
  /// operation. The last two are for the operation's own use.
  Words show(Block& block, std::uint64_t first = 0, std::uint64_t second = 0) const;
  /// Runs `prepare`, which validates and returns the words to show; publishes them, or the Error it throws.
  void ready(FunctionRef<Words()> prepare);
  /// True once every rank is ready and none has failed or disagrees. Never waits.
  bool agreed();
  /// Waits for the ready of every rank. Throws the same Error on every rank: that of the lowest rank that failed, or
  /// mismatch naming two ranks and what each of them does.
  void meet();
  /// What `peer` showed; valid after meet().
  const Words& words(int peer) const { return words_[static_cast<std::size_t>(peer)]; }

  /// Says that this rank has given every peer all it gets from it.
  void done();
  bool is_done(int peer) const;
  /// Waits for the done of `peer`; `what` completes "rank 3 is late: ...".
  void await_done(int peer, std::string_view what);

  /// This rank will touch no peer's memory for this operation again.
  void complete();

  /// Advance `work` while other operations of the communicator wait, until complete().
  void keep_advancing(InFlight* work);

  Waiting waiting(int peer, std::string_view what) const;

 private:
  bool seen(int peer);
  void check_agreement();
  [[noreturn]] void throw_mismatch(int other);

  Communicator communicator_;
  Signature signature_;
  std::uint64_t sequence_ = 0;
  int ready_line_ = 0, done_line_ = 0;
  InFlight* work_ = nullptr;
  std::pmr::vector<Line> lines_;  // [P] what each rank showed in its ready; sequence 0: not yet seen
  std::pmr::vector<Words> words_;
  int missing_ = 0;  // entries of lines_ not yet seen
  bool completed_ = false;
  int unwinding_ = 0;  // exceptions in flight when this operation began
};

/// An operation that does no more than meet: what `prepare` throws on a rank, every rank throws.
/// Returns what each rank's showed. Collective. Throws Error: as Operation::meet. Cost: one meeting.
std::pmr::vector<Operation::Words> meet(const Communicator& communicator, const Signature& signature,
                                        FunctionRef<Operation::Words()> prepare);

}  // namespace expar
