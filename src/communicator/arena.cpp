// Arena: blocks cut from segments that peers can address.
#include "src/communicator/arena.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace expar {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kSmallestSegment = std::size_t{1} << 20;
constexpr std::size_t kUsualRanges = 64;  // a layer's pass has about ten blocks

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }
std::size_t room_of(std::size_t bytes) { return round_up(std::max<std::size_t>(bytes, 1), kAlignment); }

}  // namespace

Arena::Arena(std::shared_ptr<Transport> transport) : transport_(std::move(transport)) {
  free_.reserve(kUsualRanges);
  retired_.reserve(kUsualRanges);
}

void Arena::give_back(Range range) {
  auto next = std::lower_bound(free_.begin(), free_.end(), range.place,
                               [](const Range& one, const Place& place) { return one.place < place; });
  if (next != free_.end() && range.meets(*next)) {
    range.bytes += next->bytes;
    next = free_.erase(next);
  }
  if (next != free_.begin() && std::prev(next)->meets(range)) {
    std::prev(next)->bytes += range.bytes;
    return;
  }
  free_.insert(next, range);
}

/// Frees the retired blocks that no rank can touch any more.
void Arena::reclaim() {
  if (retired_.empty() || transport_->failure()) return;  // after a failure a late rank may still write: never reuse
  const Group* asked = nullptr;
  std::uint64_t completed = 0;
  std::erase_if(retired_, [&](const Retired& block) {
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
std::vector<Arena::Range>::iterator Arena::best_fit(std::size_t bytes) {
  auto best = free_.end();
  for (auto range = free_.begin(); range != free_.end(); ++range) {
    if (range->bytes >= bytes && (best == free_.end() || range->bytes < best->bytes)) best = range;
  }
  return best;
}

void Arena::add_segment(std::size_t bytes) {
  const Segment segment =
      transport_->grow(round_up(std::max({bytes, kSmallestSegment, capacity_ / 2}), kSmallestSegment));
  capacity_ += segment.bytes.size();
  segments_.insert_or_assign(segment.id, segment.bytes);
  give_back({{segment.id, 0}, segment.bytes.size()});
}

std::size_t Arena::capacity() const {
  const std::lock_guard lock(mutex_);
  return capacity_;
}

Block Arena::allocate(std::size_t bytes, std::shared_ptr<const Group> group) {
  const std::size_t room = room_of(bytes);
  const std::lock_guard lock(mutex_);
  reclaim();
  auto range = best_fit(room);
  if (range == free_.end()) {
    add_segment(room);
    range = best_fit(room);
  }
  const Place place = range->place;
  range->place.offset += room;
  range->bytes -= room;
  if (range->bytes == 0) free_.erase(range);

  Block block;
  block.arena_ = shared_from_this();
  block.shown_to_ = std::move(group);
  block.ref_ = {place.segment, place.offset};
  block.bytes_ = segments_.at(place.segment).subspan(place.offset, bytes);
  return block;
}

void Arena::release(Block& block) {
  const std::lock_guard lock(mutex_);
  retired_.push_back({{{block.ref_.segment, block.ref_.offset}, room_of(block.bytes_.size())},
                      block.last_use_,
                      std::move(block.shown_to_)});
}

Block::Block(Block&& other) noexcept
    : arena_(std::exchange(other.arena_, nullptr)),
      shown_to_(std::move(other.shown_to_)),
      ref_(other.ref_),
      bytes_(std::exchange(other.bytes_, {})),
      last_use_(other.last_use_) {}

Block& Block::operator=(Block&& other) noexcept {
  std::swap(arena_, other.arena_);
  std::swap(shown_to_, other.shown_to_);
  std::swap(ref_, other.ref_);
  std::swap(bytes_, other.bytes_);
  std::swap(last_use_, other.last_use_);
  return *this;
}

Block::~Block() {
  if (arena_ != nullptr) arena_->release(*this);
}

}  // namespace expar
