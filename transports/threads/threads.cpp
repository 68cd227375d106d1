// Ranks as threads: the shared memory is the process's own, and a rank's end is what its transport's destructor says.
#include "transports/threads/threads.h"

#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "transports/shared/cause.h"
#include "transports/shared/local_transport.h"
#include "transports/shared/pages.h"
#include "transports/shared/ring_messages.h"

namespace expar::threads {

using local::JobMemory;
using local::Pages;

struct ThreadsJob::State {
  State(int ranks, bool with_mapping)
      : size(ranks),
        mapping(with_mapping),
        ring_bytes(JobMemory::ring_bytes(ranks, with_mapping)),
        pages(Pages::anonymous(JobMemory::bytes(ranks, ring_bytes))),
        memory(pages.bytes(), ranks, ring_bytes),
        cores(available_cores().usable()),
        segments(static_cast<std::size_t>(ranks)) {}

  int size;
  bool mapping;
  std::size_t ring_bytes;
  Pages pages;
  JobMemory memory;
  int cores;
  std::mutex mutex;
  /// By rank, then id. The job owns them: a rank that is late to notice the end may still write to one that has left.
  std::vector<std::deque<Pages>> segments;  // guarded by mutex
};

class ThreadsTransport final : public local::LocalTransport {
 public:
  ThreadsTransport(int rank, std::shared_ptr<ThreadsJob::State> state)
      : LocalTransport("threads", rank, state->memory, state->cores,
                       std::make_unique<local::RingMessages>(state->memory, rank)),
        state_(std::move(state)),
        mapped_(static_cast<std::size_t>(state_->size)) {
    self().presence.store(local::Presence::here);
  }
  ~ThreadsTransport() override { leave(); }

  Segment grow(std::size_t bytes) override {
    check();
    Pages pages = Pages::anonymous(bytes);
    const std::lock_guard lock(state_->mutex);
    auto& mine = state_->segments[static_cast<std::size_t>(rank())];
    mine.push_back(std::move(pages));
    return {static_cast<std::uint32_t>(mine.size() - 1), mine.back().bytes()};
  }

  bool mapped(int peer) const override { return state_->mapping || peer == rank(); }

  std::span<std::byte> map(int peer, std::uint32_t id) override {
    auto& known = mapped_[static_cast<std::size_t>(peer)];
    if (id < known.size()) return known[id];
    check();
    if (!mapped(peer)) throw Error(ErrorCode::internal, "rank " + std::to_string(peer) + " is not mapped", {rank()});
    const std::lock_guard lock(state_->mutex);
    const auto& segments = state_->segments[static_cast<std::size_t>(peer)];
    if (id >= segments.size()) {
      throw Error(ErrorCode::internal, "rank " + std::to_string(peer) + " has no segment " + std::to_string(id),
                  {rank(), peer});
    }
    for (std::size_t i = known.size(); i < segments.size(); ++i) known.push_back(segments[i].bytes());
    return known[id];
  }

 private:
  // A thread cannot die alone; one that ends or throws destroys its transport.
  std::optional<Dead> find_dead() override { return std::nullopt; }

  std::shared_ptr<ThreadsJob::State> state_;
  std::vector<std::vector<std::span<std::byte>>> mapped_;  // by rank, then id: what map() has found
};

ThreadsJob::ThreadsJob(int ranks, bool mapping) {
  if (ranks < 1) {
    throw Error(ErrorCode::bad_argument, "a job needs at least one rank, not " + std::to_string(ranks));
  }
  state_ = std::make_shared<State>(ranks, mapping);
}

std::unique_ptr<Transport> ThreadsJob::transport(int rank) const {
  return std::make_unique<ThreadsTransport>(rank, state_);
}

Error ThreadsJob::abort(int rank, const Error& cause) const { return local::set_cause(state_->memory, rank, cause); }

std::optional<Error> ThreadsJob::failure() const { return local::cause(state_->memory); }

}  // namespace expar::threads
