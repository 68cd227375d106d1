// What the handles of one communicator share, what all communicators of a rank share, and how board lines are numbered.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <vector>

#include <expar/communicator.h>

namespace expar {

/// Operations in flight at once, of the job's communicator and of a group's. A communicator has one line that tells
/// what it has completed, and two for each of these.
inline constexpr std::uint64_t kSlots = 64;
inline constexpr std::uint64_t kGroupSlots = 8;
inline constexpr int kCompletedLine = 0;
constexpr int lines_of(std::uint64_t slots) { return static_cast<int>(1 + 2 * slots); }

inline constexpr std::size_t kLargestKept = 4 << 20;  // as libstdc++'s pools at most; more comes from the system

/// Groups that a rank can be in at once.
inline constexpr int kGroups = 15;
static_assert(lines_of(kSlots) + kGroups * lines_of(kGroupSlots) <= kBoardLines);

/// The operations that every rank has completed are those before the returned one.
inline std::uint64_t completed_by_all(const Transport& transport) {
  std::uint64_t lowest = UINT64_MAX;
  for (int peer = 0; peer < transport.size(); ++peer) {
    // The line shows the first operation its rank has not completed; before the first, it shows nothing.
    lowest = std::min(lowest, std::max<std::uint64_t>(1, transport.peek(peer, kCompletedLine).sequence));
  }
  return lowest;
}

/// What the communicators of one rank share.
struct RankState {
  explicit RankState(std::shared_ptr<Transport> transport) : job(std::move(transport)) {}

  std::shared_ptr<Transport> job;
  std::vector<InFlight*> in_flight;
  std::uint32_t places = 0;        // bit i: this rank is in a group whose lines are the i-th
  std::uint64_t last_of_gone = 0;  // no operation of a group that this rank has left had a higher number
};

struct Communicator::State {
  explicit State(std::shared_ptr<Transport> t)
      : transport(t),
        rank(std::make_shared<RankState>(t)),
        arena(t),
        memory(std::make_shared<std::pmr::synchronized_pool_resource>(
            std::pmr::pool_options{.max_blocks_per_chunk = 4, .largest_required_pool_block = kLargestKept})) {}
  /// A group's, whose operations are numbered from `first`.
  State(const State& whole, const std::vector<int>& members, int own, int place, std::uint64_t first);
  ~State();

  int ready_line(std::uint64_t sequence) const { return static_cast<int>(1 + 2 * (sequence % slots)); }
  int done_line(std::uint64_t sequence) const { return ready_line(sequence) + 1; }
  int job_rank(int r) const { return members.empty() ? r : members[static_cast<std::size_t>(r)]; }

  std::shared_ptr<Transport> transport;
  std::shared_ptr<RankState> rank;
  Arena arena;
  std::shared_ptr<std::pmr::memory_resource> memory;
  std::uint64_t slots = kSlots;
  std::vector<int> members;    // of a group: ranks of the job
  int place = -1;              // of a group
  std::uint64_t next = 1;      // sequence of the next operation
  std::uint64_t lowest = 1;    // first operation that this rank has not completed
  std::uint64_t open = 0;      // bit sequence % slots: started and not completed
  std::uint64_t reusable = 1;  // operations before this one are completed by all, as far as is known
};

}  // namespace expar
