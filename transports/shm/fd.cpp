// sendmsg and recvmsg with SCM_RIGHTS.
#include "transports/shm/fd.h"

#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>

#include <expar/error.h>

namespace expar::shm {
namespace {

/// Room for one descriptor; what comes beyond is closed by the kernel.
struct Control {
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> bytes{};
};

[[noreturn]] void fail(const char* what, int error) {
  throw Error(ErrorCode::io, std::string(what) + ": " + std::generic_category().message(error));
}

}  // namespace

void Fd::reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

Sent send_packet(int socket, std::span<const std::byte> packet, int file) {
  iovec piece{const_cast<std::byte*>(packet.data()), packet.size()};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  Control control;
  if (file >= 0) {
    message.msg_control = control.bytes.data();
    message.msg_controllen = control.bytes.size();
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof file);
    std::memcpy(CMSG_DATA(header), &file, sizeof file);
  }
  while (sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
    switch (errno) {
      case EINTR:
        continue;
      case EAGAIN:
      case ENOBUFS:
      case ETOOMANYREFS:  // too many descriptors of this user are under way: they will be received some time
        return Sent::would_block;
      case EPIPE:
      case ECONNRESET:
      case ENOTCONN:
        return Sent::closed;
      default:
        fail("cannot send to another rank", errno);
    }
  }
  return Sent::yes;
}

Received receive_packet(int socket, std::span<std::byte> packet) {
  iovec piece{packet.data(), packet.size()};
  Control control;
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control.bytes.data();
  message.msg_controllen = control.bytes.size();
  Received received;
  ssize_t n = -1;
  while ((n = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)) < 0) {
    if (errno == EINTR) continue;
    // A reset says that the other end left without reading everything. It is said once; what it sent follows.
    if (errno == ECONNRESET) continue;
    if (errno == EAGAIN) return received;
    fail("cannot receive from another rank", errno);
  }
  if (cmsghdr* header = CMSG_FIRSTHDR(&message);
      header != nullptr && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
    int file = -1;
    std::memcpy(&file, CMSG_DATA(header), sizeof file);
    received.file = Fd(file);
  }
  if ((message.msg_flags & MSG_CTRUNC) != 0) fail("cannot receive a file descriptor (see ulimit -n)", EMFILE);
  const bool whole = static_cast<std::size_t>(n) == packet.size() && (message.msg_flags & MSG_TRUNC) == 0;
  received.what = whole ? Received::What::packet : Received::What::closed;
  return received;
}

}  // namespace expar::shm
