// What the handles of one communicator share, and what all communicators of a rank share.
#pragma once

#include <cstdint>
#include <memory>
#include <memory_resource>
#include <vector>

#include <expar/operation.h>

#include "src/communicator/arena.h"
#include "src/communicator/group.h"

namespace expar {

/// What the communicators of one rank share.
struct RankState {
  explicit RankState(std::shared_ptr<Transport> transport);

  std::shared_ptr<Arena> arena;
  std::shared_ptr<std::pmr::memory_resource> memory;
  std::vector<InFlight*> in_flight;
  std::uint32_t places = 1;        // bit i: this rank is in a group of that place
  std::uint64_t last_of_gone = 0;  // no operation of a group that this rank has left had a higher number
};

struct Communicator::State {
  /// Operations are numbered from `first`.
  State(std::shared_ptr<RankState> rank, Group group, std::uint64_t first);
  ~State();

  int ready_line(std::uint64_t sequence) const { return static_cast<int>(1 + 2 * (sequence % group->slots())); }
  int given_line(std::uint64_t sequence) const { return ready_line(sequence) + 1; }
  std::uint64_t open_bit(std::uint64_t sequence) const { return std::uint64_t{1} << (sequence % group->slots()); }

  std::shared_ptr<RankState> rank;
  std::shared_ptr<const Group> group;
  std::uint64_t next;      // sequence of the next operation
  std::uint64_t lowest;    // first operation that this rank has not completed
  std::uint64_t reusable;  // operations before this one are completed by all, as far as is known
  std::uint64_t open = 0;  // bits of the operations that are started and not completed
};

}  // namespace expar
