// Arena: blocks cut from segments that peers can address, and the rule for using one again.
#include <expar/communicator.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <utility>

#include "src/communicator/state.h"

namespace expar {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kSmallestSegment = std::size_t{1} << 20;
constexpr std::size_t kUsualRanges = 64;  // a layer's pass has about ten blocks

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

/// The free ranges of a rank's segments. Blocks share it, so that they may outlive the communicator.
struct Block::Owner {
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
    std::shared_ptr<Transport> shown_to;
  };

  explicit Owner(std::shared_ptr<Transport> t) : transport(std::move(t)) {
    free.reserve(kUsualRanges);
    retired.reserve(kUsualRanges);
  }

  void give_back(Range range) {
    auto next = std::lower_bound(free.begin(), free.end(), range.place,
                                 [](const Range& one, const Place& place) { return one.place < place; });
    if (next != free.end() && range.meets(*next)) {
      range.bytes += next->bytes;
      next = free.erase(next);
    }
    if (next != free.begin() && std::prev(next)->meets(range)) {
      std::prev(next)->bytes += range.bytes;
      return;
    }
    free.insert(next, range);
  }

  /// Frees the retired blocks that no rank can touch any more.
  void reclaim() {
    if (retired.empty() || transport->failure()) return;  // after a failure a late rank may still write: never reuse
    const Transport* asked = nullptr;
    std::uint64_t completed = 0;
    std::erase_if(retired, [&](const Retired& block) {
      if (block.shown_to.get() != asked) {
        asked = block.shown_to.get();
        completed = completed_by_all(*asked);
      }
      if (block.last_use >= completed) return false;
      give_back(block.range);
      return true;
    });
  }

  /// The smallest free range that fits.
  std::vector<Range>::iterator best_fit(std::size_t bytes) {
    auto best = free.end();
    for (auto range = free.begin(); range != free.end(); ++range) {
      if (range->bytes >= bytes && (best == free.end() || range->bytes < best->bytes)) best = range;
    }
    return best;
  }

  void add_segment(std::size_t bytes) {
    const Segment segment =
        transport->grow(round_up(std::max({bytes, kSmallestSegment, capacity / 2}), kSmallestSegment));
    capacity += segment.bytes.size();
    segments.insert_or_assign(segment.id, segment.bytes);
    give_back({{segment.id, 0}, segment.bytes.size()});
  }

  std::mutex mutex;  // a handle may be released on another thread than the rank's
  std::shared_ptr<Transport> transport;
  std::map<std::uint32_t, std::span<std::byte>> segments;
  std::vector<Range> free;  // ascending; few, as neighbours join
  std::vector<Retired> retired;
  std::size_t capacity = 0;
};

Arena::Arena(std::shared_ptr<Transport> transport)
    : owner_(std::make_shared<Block::Owner>(transport)), shown_to_(std::move(transport)) {}
Arena::Arena(const Arena& arena, std::shared_ptr<Transport> group)
    : owner_(arena.owner_), shown_to_(std::move(group)) {}
Arena::~Arena() = default;

std::size_t Arena::capacity() const {
  const std::lock_guard lock(owner_->mutex);
  return owner_->capacity;
}

Block Arena::allocate(std::size_t bytes) {
  const std::size_t room = round_up(std::max<std::size_t>(bytes, 1), kAlignment);
  const std::lock_guard lock(owner_->mutex);
  owner_->reclaim();
  auto range = owner_->best_fit(room);
  if (range == owner_->free.end()) {
    owner_->add_segment(room);
    range = owner_->best_fit(room);
  }
  const Block::Owner::Place place = range->place;
  range->place.offset += room;
  range->bytes -= room;
  if (range->bytes == 0) owner_->free.erase(range);

  Block block;
  block.owner_ = owner_;
  block.shown_to_ = shown_to_;
  block.ref_ = {place.segment, place.offset};
  block.bytes_ = owner_->segments.at(place.segment).subspan(place.offset, bytes);
  return block;
}

Block::Block(Block&& other) noexcept
    : owner_(std::exchange(other.owner_, nullptr)),
      shown_to_(std::move(other.shown_to_)),
      ref_(other.ref_),
      bytes_(std::exchange(other.bytes_, {})),
      last_use_(other.last_use_) {}

Block& Block::operator=(Block&& other) noexcept {
  std::swap(owner_, other.owner_);
  std::swap(shown_to_, other.shown_to_);
  std::swap(ref_, other.ref_);
  std::swap(bytes_, other.bytes_);
  std::swap(last_use_, other.last_use_);
  return *this;
}

Block::~Block() {
  if (owner_ == nullptr) return;
  const std::lock_guard lock(owner_->mutex);
  const std::size_t room = round_up(std::max<std::size_t>(bytes_.size(), 1), kAlignment);
  owner_->retired.push_back({{{ref_.segment, ref_.offset}, room}, last_use_, std::move(shown_to_)});
}

}  // namespace expar
