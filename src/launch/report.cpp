// The wire between a rank that fails and its launcher, both ends of it.
#include "src/launch/report.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include <expar/registry.h>

namespace expar {
namespace launch_detail {
namespace {

constexpr std::uint32_t kMagic = 0x70787265;  // "erxp"
constexpr std::size_t kMaxText = 3072;

/// One SEQPACKET datagram: it arrives whole or not at all, whoever is killed while sending.
struct Datagram {
  std::uint32_t magic = kMagic;
  std::int32_t from = -1;
  std::int32_t code = 0;
  std::int32_t rank = -1;
  std::int32_t peer = -1;
  std::uint32_t operation = 0;  // bytes of text that are the operation; the message follows
  std::uint32_t message = 0;
  char text[kMaxText];
};
constexpr std::size_t kHeader = offsetof(Datagram, text);

bool decode(const Datagram& in, std::size_t bytes, Report& out) {
  if (bytes < kHeader || in.magic != kMagic || in.operation > kMaxText || in.message > kMaxText ||
      kHeader + in.operation + in.message != bytes || in.code < 0 || in.code > static_cast<int>(ErrorCode::internal)) {
    return false;
  }
  const std::string_view text(in.text, in.operation + in.message);
  out.from = in.from;
  out.error = Error(static_cast<ErrorCode>(in.code), std::string(text.substr(in.operation)),
                    {.rank = in.rank, .peer = in.peer, .operation = std::string(text.substr(0, in.operation))});
  return true;
}

ino_t inode_of_socket(int fd) {
  struct stat status {};
  if (fstat(fd, &status) != 0 || !S_ISSOCK(status.st_mode)) return 0;
  return status.st_ino;
}

/// The rank's end of the channel, or -1 where there is none.
int inherited_end() {
  const char* value = std::getenv(kReportVariable);
  if (value == nullptr) return -1;
  const char* end = value + std::strlen(value);
  int fd = -1;
  unsigned long long inode = 0;
  const auto first = std::from_chars(value, end, fd);
  if (first.ec != std::errc{} || fd < 0 || first.ptr == end || *first.ptr != ':') return -1;
  const auto second = std::from_chars(first.ptr + 1, end, inode);
  if (second.ec != std::errc{} || second.ptr != end || inode == 0) return -1;
  return inode_of_socket(fd) == inode ? fd : -1;
}

}  // namespace

ReportChannel::ReportChannel() {
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends_) != 0) {
    throw Error(ErrorCode::io, std::string("cannot make a socket pair: ") + std::strerror(errno),
                {.operation = "launch"});
  }
}

ReportChannel::~ReportChannel() {
  close(ends_[0]);
  close(ends_[1]);
}

std::string ReportChannel::variable() const {
  return std::to_string(ends_[1]) + ":" + std::to_string(inode_of_socket(ends_[1]));
}

std::vector<Report> ReportChannel::receive() {
  std::vector<Report> reports;
  Datagram datagram;
  while (true) {
    const ssize_t bytes = recv(ends_[0], &datagram, sizeof datagram, MSG_DONTWAIT);
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes <= 0) return reports;
    Report report;
    if (decode(datagram, static_cast<std::size_t>(bytes), report)) reports.push_back(report);
  }
}

}  // namespace launch_detail

void report_error(const Error& error) noexcept {
  using namespace launch_detail;
  const int fd = inherited_end();
  if (fd < 0) return;
  const char* rank = std::getenv("EXPAR_RANK");
  Datagram datagram;
  datagram.from = rank == nullptr ? -1 : std::atoi(rank);
  datagram.code = static_cast<std::int32_t>(error.code());
  datagram.rank = error.rank();
  datagram.peer = error.peer();
  const std::size_t operation = std::min(error.operation().size(), kMaxText / 2);
  const std::size_t message = std::min(error.message().size(), kMaxText - operation);
  datagram.operation = static_cast<std::uint32_t>(operation);
  datagram.message = static_cast<std::uint32_t>(message);
  std::memcpy(datagram.text, error.operation().data(), operation);
  std::memcpy(datagram.text + operation, error.message().data(), message);
  // Whether it arrives or not, this rank ends with the same error: nothing to do about a failure.
  [[maybe_unused]] const ssize_t sent = send(fd, &datagram, kHeader + operation + message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

}  // namespace expar
