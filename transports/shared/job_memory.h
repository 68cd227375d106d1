// The layout of the memory that all ranks of a job share: boards, doorbells, the job's cause, message rings.
//
// Zeroed memory is a valid start, so whoever supplies the memory (one process or a sealed memfd) has nothing to set up.
// Every word that two ranks touch is an atomic. Where a sleeper and a waker must not miss each other both sides use
// sequentially consistent operations on the words themselves, not fences, which ThreadSanitizer cannot follow.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include <expar/transport.h>

namespace expar::local {

static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "shared words must not need a lock");

struct alignas(64) BoardLine {
  std::atomic<std::uint64_t> sequence;
  std::array<std::atomic<std::uint64_t>, 7> words;
};

struct BoardText {
  std::array<std::atomic<std::uint64_t>, kLineText / 8> words;
};

/// What a rank sleeps on. Counts up when someone rings while `asleep` is set.
struct alignas(64) Doorbell {
  std::atomic<std::uint32_t> rings;
  std::atomic<std::uint32_t> asleep;
};

/// The cause that a rank has to offer; read only once JobHead names that rank.
struct CauseRecord {
  std::uint32_t code;
  std::int32_t rank;
  std::int32_t peer;
  std::array<char, 64> operation;
  std::array<char, 1024> message;
};

enum class Presence : std::uint32_t { joining, here, left, left_in_exception };

struct RankArea {
  Doorbell bell;
  alignas(64) std::atomic<Presence> presence;
  std::atomic<std::uint32_t> segments;  // how many it has grown
  alignas(64) CauseRecord cause;
  std::array<BoardLine, kBoardLines> lines;
  alignas(64) std::array<BoardText, kBoardLines> texts;
};

struct JobHead {
  /// 1 + the rank whose CauseRecord is the job's; 0 while there is none. Set once: a rank that dies while it writes its
  /// record has not set it, so no death can leave half a cause.
  alignas(64) std::atomic<std::uint32_t> cause;
  /// How many ranks are asleep or about to be: one load tells a publisher that nobody needs waking.
  alignas(64) std::atomic<std::uint32_t> sleepers;
};

/// Both ends of a byte stream from one rank to another. The counters never wrap; each is stored by one end only.
struct RingHead {
  alignas(64) std::atomic<std::uint64_t> written;
  alignas(64) std::atomic<std::uint64_t> read;
};

/// The shared memory of one job as seen from this process; does not own it.
class JobMemory {
 public:
  /// Smaller rings where rows travel by stores, and where there are many ranks: there are size^2 of them.
  static std::size_t ring_bytes(int size, bool mapping);
  static std::size_t bytes(int size, std::size_t ring_bytes);

  JobMemory(std::span<std::byte> memory, int size, std::size_t ring_bytes);

  int size() const { return size_; }
  std::size_t ring_bytes() const { return ring_bytes_; }

  JobHead& head() const { return *reinterpret_cast<JobHead*>(base_); }
  RankArea& of(int rank) const {
    return *reinterpret_cast<RankArea*>(base_ + sizeof(JobHead) + index(rank) * sizeof(RankArea));
  }
  RingHead& ring_head(int from, int to) const;
  std::byte* ring_data(int from, int to) const;

 private:
  static std::size_t index(int rank) { return static_cast<std::size_t>(rank); }
  std::byte* ring(int from, int to) const;

  std::byte* base_ = nullptr;
  int size_ = 0;
  std::size_t ring_bytes_ = 0;
};

/// Wakes `rank` if it sleeps. Whatever it should find must have been stored with sequential consistency before.
void ring_bell(const JobMemory& job, int rank);
/// Wakes every rank that sleeps, except `but`.
void ring_bells(const JobMemory& job, int but);

}  // namespace expar::local
