// Ranks as processes: the shared memory is a sealed memfd, and a dead process shows by its socket and its pidfd.
#include "transports/shm/shm.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "transports/shared/local_transport.h"
#include "transports/shared/ring_messages.h"
#include "transports/shm/peers.h"
#include "transports/shm/protocol.h"
#include "transports/shm/rendezvous.h"
#include "transports/shm/sealed.h"
#include "transports/shm/segments.h"

namespace expar::shm {
namespace {

using local::JobMemory;
using local::Pages;

/// The memory of the job; a base class, so that it is there before LocalTransport looks at it.
struct JobPages {
  JobMemory memory_of(const Membership& self) const {
    return JobMemory(pages.bytes(), self.size, JobMemory::ring_bytes(self.size, self.mapping));
  }
  Pages pages;
};

class ShmTransport final : private JobPages, public local::LocalTransport {
 public:
  ShmTransport(const Membership& self, Pages memory, Meeting meeting, std::chrono::nanoseconds timeout)
      : JobPages{std::move(memory)},
        LocalTransport("shm", self.rank, memory_of(self), meeting.cores,
                       std::make_unique<local::RingMessages>(memory_of(self), self.rank)),
        mapping_(self.mapping),
        timeout_(timeout),
        peers_(self.rank, std::move(meeting.mesh), meeting.pids),
        segments_(self.rank, self.size) {
    this->self().presence.store(local::Presence::here);
  }

  ~ShmTransport() override { leave(); }

  Segment grow(std::size_t bytes) override {
    check();
    const Segment segment = segments_.grow(bytes, mapping_ && size() > 1);
    segments_.flush(peers_);
    self().segments.store(segment.id + 1);
    return segment;
  }

  bool mapped(int peer) const override { return mapping_ || peer == rank(); }

  std::span<std::byte> map(int peer, std::uint32_t id) override {
    if (const auto bytes = segments_.find(peer, id); !bytes.empty()) return bytes;
    check();
    if (!mapped(peer)) throw Error(ErrorCode::internal, name_of(peer) + " is not mapped", {rank(), peer, {}});
    if (peer == rank() || id >= job().of(peer).segments.load()) {
      throw Error(ErrorCode::internal, name_of(peer) + " has no segment " + std::to_string(id), {rank(), peer, {}});
    }
    wait([&] { return receive(peer, id); },
         {.peer = peer, .operation = "map", .what = "its memory", .limit = timeout_});
    return segments_.find(peer, id);
  }

 private:
  bool receive(int peer, std::uint32_t id) {
    try {
      segments_.receive(peers_, peer);
      return !segments_.find(peer, id).empty();
    } catch (const Error& error) {
      throw abort(error);
    }
  }

  std::optional<Dead> find_dead() override {
    segments_.flush(peers_);
    const auto dead = peers_.find_dead(job());
    if (!dead) return std::nullopt;
    return Dead{*dead, peers_.trace(*dead)};
  }

  bool mapping_;
  std::chrono::nanoseconds timeout_;
  Peers peers_;
  Segments segments_;
};

}  // namespace

std::string missing() {
  try {
    const Fd socket = make_socket();
    const std::size_t page = local::whole_pages(1);
    return is_sealed(make_sealed(page).get(), page) ? "" : "the kernel does not seal shared memory";
  } catch (const Error& error) {
    return error.message();
  }
}

std::unique_ptr<Transport> connect(const Membership& self, std::chrono::nanoseconds timeout) {
  if (self.size < 1 || self.rank < 0 || self.rank >= self.size) {
    throw Error(ErrorCode::bad_argument,
                "there is no rank " + std::to_string(self.rank) + " of " + std::to_string(self.size));
  }
  const std::size_t bytes = bytes_of_memory(self);
  if (self.size == 1) {
    return std::make_unique<ShmTransport>(self, Pages::anonymous(bytes), Meeting{}, timeout);
  }
  Meeting meeting = meet(self, timeout);
  Pages memory = Pages::shared(meeting.memory.get(), bytes);
  meeting.memory.reset();
  return std::make_unique<ShmTransport>(self, std::move(memory), std::move(meeting), timeout);
}

}  // namespace expar::shm
