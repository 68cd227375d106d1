// The one protocol between ranks: dispatch, combine and every collective are written on operations and on nothing else.
#pragma once

#include <array>
#include <cstdint>
#include <memory_resource>
#include <span>
#include <string>
#include <string_view>

#include <expar/communicator.h>

namespace expar {

/// What all ranks must agree on when they start an operation: its name and a few numbers. At most 24 numbers. Names are
/// not copied: they live as long as the operation.
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

/// One collective in progress on this rank. All ranks construct the same operations in the same order; up to 64 may be
/// in progress on a communicator, 8 on a group of it, beyond which the job ends.
///
/// It has two meeting points: `ready` (I have started, here is what you need from me) and `given` (you have all you get
/// from me); then each rank says on its own when it is `complete` (I touch nothing of yours any more). A rank that
/// cannot start says why in its ready, and every rank throws that error at meet(), before bytes move: the operation is
/// complete then and the communicator usable.
///
/// Destroying an operation before complete() ends the job, unless an exception unwinds it: that is the cause, which
/// whoever catches it at the rank's end tells the others (run_threads does, or abort()). Where it is caught before, the
/// operation stays open for good. That harms no memory: blocks it showed and room() are never used again, and messages
/// still go out. But the others may wait for it in vain, until their limit, and it counts among those in progress. What
/// all ranks find alike after meet() is therefore thrown after complete().
class Operation {
 public:
  using Words = std::array<std::uint64_t, 5>;

  /// Takes the next sequence number. Waits where the lines of an earlier operation are still in use.
  /// Throws Error: the job's cause if there is one; bad_argument (too many in progress; it ends the job), as wait().
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
  /// Memory for messages: nobody else gets it before every rank has completed this operation. Throws Error: no_memory.
  Block room(std::size_t bytes) const;
  /// Runs `prepare`, which validates and returns the words to show; publishes them, or the Error or bad_alloc it
  /// throws. Throws what else `prepare` throws; its Error too where that is timeout or peer_lost, or the job has ended.
  void ready(FunctionRef<Words()> prepare);
  /// True once every rank is ready and none has failed or disagrees. Never waits.
  bool agreed();
  /// Waits for the ready of every rank. Throws the same Error on every rank: that of the lowest rank that failed, or
  /// mismatch naming two ranks and what each of them does; timeout, peer_lost or the job's cause as wait().
  void meet();
  /// What `peer` showed; valid after meet().
  const Words& words(int peer) const { return words_[static_cast<std::size_t>(peer)]; }

  /// Says that this rank has given every peer all it gets from it.
  void gave_all();
  bool has_given(int peer) const;
  /// Waits for what `peer` gives; `what` completes "rank 3 is late: ...". Throws as wait().
  void await_given(int peer, std::string_view what);

  /// Says that this rank will touch no peer's memory for this operation again.
  void complete();

  /// Advance `work` while other operations of the communicator wait, until complete().
  void keep_advancing(InFlight* work);

  /// For wait(): this operation, and `peer` as the job knows it.
  Waiting waiting(int peer, std::string_view what) const;

 private:
  bool seen(int peer);
  void check_agreement();
  [[noreturn]] void throw_mismatch(int other);

  Communicator communicator_;
  Signature signature_;
  std::uint64_t sequence_ = 0;
  int ready_line_ = 0, given_line_ = 0;
  InFlight* work_ = nullptr;
  std::pmr::vector<Line> lines_;  // [P] what each rank showed in its ready; sequence 0: not yet seen
  std::pmr::vector<Words> words_;
  int missing_ = 0;  // entries of lines_ not yet seen
  bool completed_ = false;
  int unwinding_ = 0;  // exceptions in flight when this operation began
};

/// An operation that does no more than meet: what `prepare` throws on a rank, every rank throws.
/// Returns what each rank's showed. Collective. Throws Error: as Operation::meet. Cost: one meeting, which is one line
/// to write and P - 1 to read where nobody is late.
std::pmr::vector<Operation::Words> meet(const Communicator& communicator, const Signature& signature,
                                        FunctionRef<Operation::Words()> prepare);

}  // namespace expar
