// The seam to the machine: what a way of connecting ranks must supply, and nothing that can be written once on top.
//
// A transport has three abilities. Signals: lines that a rank shows to all others, one way to wait, one way to give up.
// Arena: memory that a peer can address, or "this peer is not mapped". Messages: bytes to a peer that is not.
// Everything that synchronises goes through here; rows are stored directly into mapped memory.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include <expar/error.h>
#include <expar/pool.h>
#include <expar/trace.h>

namespace expar {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

/// What one rank shows to all others: one cache line. `sequence` is stored last and read first (release, acquire).
struct alignas(64) Line {
  std::uint64_t sequence = 0;
  std::array<std::uint64_t, 7> words{};
};

/// A piece of this rank's memory that mapped peers can address. Segments never move and live as long as the transport.
struct Segment {
  std::uint32_t id = 0;
  std::span<std::byte> bytes;
};

/// One end of a transfer to or from a peer. Both ends name the same tag and the same size; `data` must stay valid
/// until test() is true. Messages of one pair and tag arrive in the order of their starts.
struct Message {
  enum class Kind : std::uint8_t { send, receive };
  Kind kind = Kind::send;
  int peer = 0;
  std::uint64_t tag = 0;
  std::byte* data = nullptr;
  std::size_t bytes = 0;
};

/// Names what a wait is for, so that an error can say it.
struct Waiting {
  int peer = -1;               // the rank waited for; -1 when it is not one
  std::string_view operation;  // "dispatch"
  std::string_view what;       // "its rows", "to start": completes "rank 3 is late: ..."
  Clock::duration limit{};     // counted from the start of the wait
  /// Tells of a rank whether it is waited for like `peer`, so that a timeout can name all that are late; or null.
  const FunctionRef<bool(int rank)>* awaited = nullptr;
};

/// The lines of a rank's board. Communicators decide what each line means.
inline constexpr int kBoardLines = 384;
/// A line can carry this much text beside its words (an error message); longer text is cut.
inline constexpr std::size_t kLineText = 448;

/// Ranks and how they reach each other. One object per rank; one thread at a time uses it.
class Transport {
 public:
  virtual ~Transport() = default;  // the rank leaves: later waits of others for it fail with peer_lost

  int rank() const { return rank_; }
  int size() const { return size_; }
  /// "threads", "shm", ...
  std::string_view name() const { return name_; }

  // ---- signals

  /// Shows `line` (and text) as this rank's board line `index` to every peer, and wakes those that sleep.
  /// Everything this rank stored before is visible to whoever sees the line, non-temporal stores included.
  /// Never waits, never throws. Cost: a store, and a system call where somebody sleeps.
  virtual void publish(int index, const Line& line, std::string_view text = {}) = 0;

  /// The board line `index` of `peer` as it is now; sequence 0 means nothing yet. Never waits.
  virtual Line peek(int peer, int index) const = 0;
  /// The text beside that line, of at most kLineText - 1 characters; empty where none was given.
  virtual std::string text(int peer, int index) const = 0;

  /// Returns once done() is true; done() is called again and again and may do work. Messages move along meanwhile.
  /// Spins where every rank has a core, yields from the first miss where ranks outnumber cores, then sleeps.
  /// Throws Error: the job's cause where one is set; peer_lost (a rank died, or `waiting.peer` has left) within 50 ms;
  /// timeout past `waiting.limit`. Both are set as the job's cause before they are thrown.
  void wait(FunctionRef<bool()> done, const Waiting& waiting);

  /// Ends the job: from now on wait() throws the job's cause on every rank, and no rank that sees the cause moves a
  /// byte of a message. The first cause stays; the one that is in force is returned, so that every rank throws the
  /// same.
  virtual Error abort(const Error& cause) = 0;
  /// The job's cause, if one is set. Costs one load while there is none.
  virtual std::optional<Error> failure() const = 0;

  // ---- arena

  /// Adds a segment of at least `bytes`, zeroed and pre-faulted. Local: peers learn of it when they map it.
  /// Throws Error: no_memory, the job's cause.
  virtual Segment grow(std::size_t bytes) = 0;
  /// True if this rank can address the segments of `peer` (always true for itself).
  virtual bool mapped(int peer) const = 0;
  /// The segment `id` of a mapped peer. May wait at the first call, which the later ones do not.
  /// Throws Error: internal (the peer is not mapped or has no such segment), as wait().
  virtual std::span<std::byte> map(int peer, std::uint32_t id) = 0;

  // ---- messages

  using Ticket = std::uint64_t;
  /// Posts sends and receives, to peers mapped or not, and returns. Throws Error: the job's cause, as test().
  virtual Ticket start(std::span<const Message> messages) = 0;
  /// Moves messages along; true once all messages of `ticket` have completed. A ticket is tested true once.
  /// Throws Error: the job's cause; internal (two ends name different sizes), which it sets as that.
  virtual bool test(Ticket ticket) = 0;

  // ---- tracing

  /// From here on what this rank does and waits for becomes spans of `trace`; null ends it.
  void record(std::shared_ptr<Trace> trace) { trace_ = std::move(trace); }
  /// Null where nothing is recorded.
  Trace* trace() const { return trace_.get(); }

  // ---- interruption

  /// From here on wait() asks `asked` at least every 50 ms while it waits, on the thread that waits. Where it says
  /// true, wait() sets the error internal "was interrupted", which names this rank, as the job's cause and throws the
  /// cause in force. `asked` must not throw; empty ends it. Cost: a branch where nobody asks, else a look at the clock
  /// per turn.
  void interrupt_by(std::function<bool()> asked) { asked_ = std::move(asked); }

 protected:
  /// `name` is a literal, or outlives the transport.
  Transport(std::string_view name, int rank, int size) : name_(name), rank_(rank), size_(size) {}

  /// What wait() promises, but for tracing and interruption: calls done() at least every 25 ms.
  virtual void wait_until(FunctionRef<bool()> done, const Waiting& waiting) = 0;

 private:
  std::string_view name_;
  int rank_;
  int size_;
  std::shared_ptr<Trace> trace_;
  std::function<bool()> asked_;
};

}  // namespace expar
