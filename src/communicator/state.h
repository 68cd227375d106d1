// What the handles of one communicator share, and how its board lines are numbered.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <vector>

#include <expar/communicator.h>

namespace expar {

/// Operations in flight at once. Each owns two board lines; the last line tells what is completed.
inline constexpr std::uint64_t kSlots = 64;
inline constexpr int kCompletedLine = 2 * kSlots;
static_assert(kCompletedLine < kBoardLines);

inline constexpr std::size_t kLargestKept = 4 << 20;  // as libstdc++'s pools at most; more comes from the system

inline int ready_line(std::uint64_t sequence) { return static_cast<int>(2 * (sequence % kSlots)); }
inline int done_line(std::uint64_t sequence) { return ready_line(sequence) + 1; }

/// The operations that every rank has completed are those before the returned one.
inline std::uint64_t completed_by_all(const Transport& transport) {
  std::uint64_t lowest = UINT64_MAX;
  for (int peer = 0; peer < transport.size(); ++peer) {
    // The line shows the first operation its rank has not completed; before the first, it shows nothing.
    lowest = std::min(lowest, std::max<std::uint64_t>(1, transport.peek(peer, kCompletedLine).sequence));
  }
  return lowest;
}

struct Communicator::State {
  State(std::shared_ptr<Transport> t, std::chrono::nanoseconds limit)
      : transport(std::move(t)), arena(transport), timeout(limit) {
    memory = std::make_shared<std::pmr::synchronized_pool_resource>(
        std::pmr::pool_options{.max_blocks_per_chunk = 4, .largest_required_pool_block = kLargestKept});
  }

  std::shared_ptr<Transport> transport;
  Arena arena;
  std::shared_ptr<std::pmr::memory_resource> memory;
  std::chrono::nanoseconds timeout;
  std::uint64_t next = 1;      // sequence of the next operation
  std::uint64_t lowest = 1;    // first operation that this rank has not completed
  std::uint64_t open = 0;      // bit sequence % kSlots: started and not completed
  std::uint64_t reusable = 1;  // operations before this one are completed by all, as far as is known
  std::vector<InFlight*> in_flight;
};

}  // namespace expar
