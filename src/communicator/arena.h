// The segments behind a rank's blocks, and the rule for using a block again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include <expar/communicator.h>

#include "src/communicator/group.h"

namespace expar {

/// The free ranges of a rank's segments. Growth adds a segment; none ever moves or shrinks. Blocks share it, so that
/// they may outlive the communicator, and be released on another thread than the rank's.
class Arena : public std::enable_shared_from_this<Arena> {
 public:
  explicit Arena(std::shared_ptr<Transport> transport);
  /// As Communicator::allocate, for blocks that are shown to `group`.
  Block allocate(std::size_t bytes, std::shared_ptr<const Group> group);
  void release(Block& block);
  std::size_t capacity() const;

 private:
  struct Place {
    std::uint32_t segment;
    std::uint64_t offset;
    auto operator<=>(const Place&) const = default;
  };
  struct Range {
    Place place;
    std::size_t bytes;
    /// Whether `next` begins where this ends.
    bool meets(const Range& next) const {
      return place.segment == next.place.segment && place.offset + bytes == next.place.offset;
    }
  };
  struct Retired {
    Range range;
    std::uint64_t last_use;
    std::shared_ptr<const Group> shown_to;
  };

  void give_back(Range range);
  void reclaim();
  std::vector<Range>::iterator best_fit(std::size_t bytes);
  void add_segment(std::size_t bytes);

  mutable std::mutex mutex_;
  std::shared_ptr<Transport> transport_;
  std::map<std::uint32_t, std::span<std::byte>> segments_;
  std::vector<Range> free_;  // ascending; few, as neighbours join
  std::vector<Retired> retired_;
  std::size_t capacity_ = 0;
};

}  // namespace expar
