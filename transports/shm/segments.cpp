// Descriptors travel over the sockets between ranks; a segment's mapping outlives its descriptor.
#include "transports/shm/segments.h"

#include <string>

#include <expar/error.h>

#include "transports/shm/sealed.h"

namespace expar::shm {

using local::Pages;

Segment Segments::grow(std::size_t bytes, bool shared) {
  auto& mine = incoming_[size_of(self_)];
  const auto id = static_cast<std::uint32_t>(mine.size());
  if (!shared) {
    mine.push_back({Pages::anonymous(bytes), true});
    return {id, mine.back().pages.bytes()};
  }
  const std::size_t size = local::whole_pages(bytes);
  auto file = std::make_shared<const Fd>(make_sealed(size));
  mine.push_back({Pages::shared(file->get(), size), true});
  for (std::size_t peer = 0; peer < outgoing_.size(); ++peer) {
    if (peer == size_of(self_)) continue;
    outgoing_[peer].push_back({{id, size}, file});
    queued_ = true;
  }
  return {id, mine.back().pages.bytes()};
}

void Segments::flush(const Peers& peers) {
  if (!queued_) return;
  queued_ = false;
  for (std::size_t peer = 0; peer < outgoing_.size(); ++peer) {
    auto& queue = outgoing_[peer];
    while (!queue.empty()) {
      const Sent sent = send_packet(peers.socket(static_cast<int>(peer)), bytes_of(queue.front().announcement),
                                    queue.front().file->get());
      if (sent == Sent::would_block) {
        queued_ = true;
        break;
      }
      if (sent == Sent::closed) {  // it needs nothing any more
        queue.clear();
        break;
      }
      queue.pop_front();
    }
  }
}

void Segments::receive(const Peers& peers, int peer) {
  auto& known = incoming_[size_of(peer)];
  for (;;) {
    Announcement announcement{};
    const Received received = receive_packet(peers.socket(peer), writable_bytes_of(announcement));
    if (received.what != Received::What::packet) return;
    if (announcement.id != known.size() || !received.file || announcement.bytes == 0 ||
        !is_sealed(received.file.get(), announcement.bytes)) {
      throw Error(ErrorCode::internal,
                  "rank " + std::to_string(peer) + " offers memory that is not sealed or not of the size it says",
                  {self_, peer, {}});
    }
    known.push_back({Pages::shared(received.file.get(), announcement.bytes, Pages::Touch::later), false});
  }
}

std::span<std::byte> Segments::find(int rank, std::uint32_t id) {
  auto& known = incoming_[size_of(rank)];
  if (id >= known.size()) return {};
  Mapped& mapped = known[id];
  if (!mapped.touched) mapped.pages.touch();
  mapped.touched = true;
  return mapped.pages.bytes();
}

}  // namespace expar::shm
