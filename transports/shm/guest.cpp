// The rendezvous as seen by all ranks but 0.
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "transports/shared/wording.h"
#include "transports/shm/protocol.h"
#include "transports/shm/sealed.h"

namespace expar::shm {
namespace {

/// Rank 0 may have started to wait later than this rank, and is the one who knows which ranks are missing.
constexpr auto kGrace = std::chrono::seconds(1);

Error lost_host(const Membership& self) {
  return joining(ErrorCode::peer_lost, "rank 0 died while " + name_of(self.rank) + " joined " + name_of(self.job),
                 self.rank, 0);
}

// The next reply; nothing if the other end hung up.
std::optional<Reply> next_reply(const Membership& self, int socket, Deadline deadline, std::chrono::nanoseconds timeout,
                                Fd& file) {
  for (;;) {
    Reply reply;
    Received received = receive_packet(socket, writable_bytes_of(reply));
    if (received.what == Received::What::closed) return std::nullopt;
    if (received.what == Received::What::packet) {
      file = std::move(received.file);
      return reply;
    }
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    if (left.count() <= 0) {
      throw joining(ErrorCode::timeout,
                    "rank 0 is late: " + name_of(self.rank) + " has waited " + local::seconds(timeout) +
                        " for it to let it join " + name_of(self.job),
                    self.rank, 0);
    }
    pollfd polled{socket, POLLIN, 0};
    poll(&polled, 1, static_cast<int>(std::min<std::int64_t>(left.count(), 1000)));
  }
}

Error refusal(const Reply& reply) {
  const auto code = static_cast<ErrorCode>(std::min(reply.code, static_cast<std::uint32_t>(ErrorCode::internal)));
  return joining(code, std::string(reply.text.data(), strnlen(reply.text.data(), reply.text.size())), reply.rank,
                 reply.peer);
}

}  // namespace

std::optional<Meeting> join_host(const Membership& self, Deadline deadline, std::chrono::nanoseconds timeout) {
  const Fd socket = make_socket();
  const Address address(self.job);
  if (connect(socket.get(), reinterpret_cast<const sockaddr*>(&address.name), address.bytes) != 0) {
    if (errno == ECONNREFUSED || errno == EAGAIN || errno == EINTR) return std::nullopt;
    throw joining(ErrorCode::io, "cannot reach rank 0: " + std::generic_category().message(errno), self.rank, 0);
  }
  // Anybody on this host may take an abstract name; what he offers there is not ours.
  if (const uid_t user = credentials(socket.get()).user; user != geteuid()) {
    throw joining(ErrorCode::io,
                  "the meeting point of " + name_of(self.job) + " is held by user " + std::to_string(user), self.rank);
  }
  const Deadline now = Clock::now();
  const auto patience = timeout > Deadline::max() - now - kGrace ? Deadline::max() : now + timeout + kGrace;
  const Deadline last = std::max(deadline, patience);

  const Hello hello{.rank = self.rank,
                    .size = self.size,
                    .mapping = self.mapping ? 1U : 0U,
                    .layout = layout_of_memory(),
                    .cores = allowed_cores(),
                    .pids = PidNamespace::own()};
  if (send_packet(socket.get(), bytes_of(hello)) != Sent::yes) return std::nullopt;

  Meeting meeting;
  meeting.mesh.resize(static_cast<std::size_t>(self.size));
  meeting.pids.resize(static_cast<std::size_t>(self.size));
  bool admitted = false;
  int missing = self.size - 1;
  for (;;) {
    Fd file;
    const auto reply = next_reply(self, socket.get(), last, timeout, file);
    // It hung up before it said anything: it had not seen this rank. Perhaps a job of the same id that has just begun.
    if (!reply && !admitted) return std::nullopt;
    if (!reply) throw lost_host(self);
    admitted = true;
    switch (reply->kind) {
      case Reply::Kind::refusal:
        throw refusal(*reply);
      case Reply::Kind::memory:
        if (!file || !is_sealed(file.get(), bytes_of_memory(self))) throw lost_host(self);
        meeting.memory = std::move(file);
        meeting.cores = static_cast<int>(reply->cores);
        break;
      case Reply::Kind::peer: {
        if (reply->peer < 0 || reply->peer >= self.size || reply->peer == self.rank || !file) throw lost_host(self);
        const auto peer = static_cast<std::size_t>(reply->peer);
        meeting.mesh[peer] = std::move(file);
        meeting.pids[peer] = reply->pid;
        if (--missing == 0 && send_packet(socket.get(), bytes_of(Ready{})) != Sent::yes) throw lost_host(self);
        break;
      }
      case Reply::Kind::go:
        return meeting;
      default:
        throw lost_host(self);
    }
  }
}

}  // namespace expar::shm
