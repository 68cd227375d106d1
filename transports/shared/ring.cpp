// Counters that only grow, taken modulo the ring's size, a power of two.
#include "transports/shared/ring.h"

#include <algorithm>
#include <cstring>

namespace expar::local {

RingWriter::RingWriter(const JobMemory& job, int from, int to)
    : head_(&job.ring_head(from, to)), data_(job.ring_data(from, to)), size_(job.ring_bytes()) {}

std::size_t RingWriter::space() {
  const std::uint64_t waiting = written_ - head_->read.load();
  if (waiting > size_) throw Error(ErrorCode::internal, "a message ring is damaged: read past its end");
  return size_ - waiting;
}

std::size_t RingWriter::write(const std::byte* data, std::size_t bytes) {
  const std::size_t n = std::min(bytes, space());
  const std::size_t at = written_ & (size_ - 1);
  const std::size_t first = std::min(n, size_ - at);
  if (first > 0) std::memcpy(data_ + at, data, first);
  if (n > first) std::memcpy(data_, data + first, n - first);
  written_ += n;
  return n;
}

RingReader::RingReader(const JobMemory& job, int from, int to)
    : head_(&job.ring_head(from, to)), data_(job.ring_data(from, to)), size_(job.ring_bytes()) {}

std::size_t RingReader::available() {
  const std::uint64_t waiting = head_->written.load() - read_;
  if (waiting > size_) throw Error(ErrorCode::internal, "a message ring is damaged: it overflowed");
  return waiting;
}

void RingReader::look(std::byte* data, std::size_t bytes) const {
  const std::size_t at = read_ & (size_ - 1);
  const std::size_t first = std::min(bytes, size_ - at);
  if (first > 0) std::memcpy(data, data_ + at, first);
  if (bytes > first) std::memcpy(data + first, data_, bytes - first);
}

}  // namespace expar::local
