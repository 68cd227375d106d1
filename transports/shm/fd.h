// File descriptors with an owner, and packets over sockets that may carry one.
#pragma once

#include <cstddef>
#include <span>
#include <utility>

namespace expar::shm {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() { reset(); }
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset();

 private:
  int fd_ = -1;
};

enum class Sent { yes, would_block, closed };

/// Sends one packet, with `file` unless it is negative. Never blocks. Throws Error: io.
Sent send_packet(int socket, std::span<const std::byte> packet, int file = -1);

struct Received {
  enum class What { packet, would_block, closed } what = What::would_block;
  Fd file;  // if the packet carried one
};

/// Receives one packet of exactly `packet.size()` bytes; others are taken for `closed`, as is a hangup. Never blocks.
/// Throws Error: io (too many open files).
Received receive_packet(int socket, std::span<std::byte> packet);

/// The bytes of a plain struct, for sending and receiving it.
template <class T>
std::span<const std::byte> bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}
template <class T>
std::span<std::byte> writable_bytes_of(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}

}  // namespace expar::shm
