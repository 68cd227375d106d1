// Where each part of the shared memory lies, and the doorbells in it.
#include "transports/shared/job_memory.h"

#include <algorithm>
#include <bit>
#include <memory>

#include "transports/shared/futex.h"

namespace expar::local {
namespace {

/// All rings of a job together take about this much ...
constexpr std::size_t kRingsOfMessages = std::size_t{64} << 20;
constexpr std::size_t kRingsOfMappedPeers = std::size_t{4} << 20;
/// ... and each of them something in between these: one page, and what stays in a core's cache.
constexpr std::size_t kSmallestRing = std::size_t{4} << 10;
constexpr std::size_t kLargestRing = std::size_t{256} << 10;

}  // namespace

std::size_t JobMemory::ring_bytes(int size, bool mapping) {
  const std::size_t pairs = index(size) * index(size);
  const std::size_t share = (mapping ? kRingsOfMappedPeers : kRingsOfMessages) / pairs;
  return std::bit_floor(std::clamp(share, kSmallestRing, kLargestRing));
}

std::size_t JobMemory::bytes(int size, std::size_t ring_bytes) {
  const std::size_t ranks = index(size);
  return sizeof(JobHead) + ranks * sizeof(RankArea) + ranks * ranks * (sizeof(RingHead) + ring_bytes);
}

JobMemory::JobMemory(std::span<std::byte> memory, int size, std::size_t ring_bytes)
    : base_(memory.data()), size_(size), ring_bytes_(ring_bytes) {}

std::byte* JobMemory::ring(int from, int to) const {
  const std::size_t number = index(from) * index(size_) + index(to);
  return base_ + sizeof(JobHead) + index(size_) * sizeof(RankArea) + number * (sizeof(RingHead) + ring_bytes_);
}

RingHead& JobMemory::ring_head(int from, int to) const { return *reinterpret_cast<RingHead*>(ring(from, to)); }

std::byte* JobMemory::ring_data(int from, int to) const { return ring(from, to) + sizeof(RingHead); }

void ring_bell(const JobMemory& job, int rank) {
  Doorbell& bell = job.of(rank).bell;
  if (bell.asleep.load() == 0 || bell.asleep.exchange(0) == 0) return;
  bell.rings.fetch_add(1);
  futex_wake(bell.rings);
}

void ring_bells(const JobMemory& job, int but) {
  if (job.head().sleepers.load() == 0) return;
  for (int rank = 0; rank < job.size(); ++rank) {
    if (rank != but) ring_bell(job, rank);
  }
}

}  // namespace expar::local
