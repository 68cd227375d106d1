// A stream of bytes from one rank to another through shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "transports/shared/job_memory.h"

namespace expar::local {

/// The sender's end.
class RingWriter {
 public:
  RingWriter(const JobMemory& job, int from, int to);
  /// Bytes that can be written now. Throws Error: internal (the reader's counter cannot be true).
  std::size_t space();
  /// Copies at most `bytes` into the ring; returns how many. Readers see them after commit().
  std::size_t write(const std::byte* data, std::size_t bytes);
  /// Advances over `bytes` of padding, which must fit.
  void skip(std::size_t bytes) { written_ += bytes; }
  void commit() { head_->written.store(written_); }

 private:
  RingHead* head_;
  std::byte* data_;
  std::size_t size_;
  std::uint64_t written_ = 0;
};

/// The receiver's end.
class RingReader {
 public:
  RingReader(const JobMemory& job, int from, int to);
  /// Bytes that can be read now. Throws Error: internal (the writer's counter cannot be true).
  std::size_t available();
  /// Copies the next `bytes`, which must be available, without consuming them.
  void look(std::byte* data, std::size_t bytes) const;
  /// The writer may use consumed bytes again after commit().
  void skip(std::size_t bytes) { read_ += bytes; }
  void commit() { head_->read.store(read_); }

 private:
  RingHead* head_;
  const std::byte* data_;
  std::size_t size_;
  std::uint64_t read_ = 0;
};

}  // namespace expar::local
