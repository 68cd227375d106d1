// The rendezvous as seen by rank 0.
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "transports/shared/wording.h"
#include "transports/shm/protocol.h"
#include "transports/shm/sealed.h"

namespace expar::shm {
namespace {

struct Visitor {
  Fd socket;
  pid_t pid = 0;        // as this process sees it
  PidNamespace pids{};  // of the visitor
};

class Host {
 public:
  Host(const Membership& self, Fd listener, Deadline deadline, std::chrono::nanoseconds timeout)
      : self_(self),
        listener_(std::move(listener)),
        deadline_(deadline),
        timeout_(timeout),
        ranks_(static_cast<std::size_t>(self.size)),
        cores_(allowed_cores()) {}

  Meeting run() {
    try {
      gather();
      return hand_out();
    } catch (const Error& error) {
      refuse(error);
      throw;
    }
  }

 private:
  void gather();
  void accept_visitors();
  void hear(Visitor& visitor);
  void admit(const Hello& hello, Visitor& visitor);
  void check_presence();
  Meeting hand_out();
  pid_t pid_for(int guest, int peer) const;
  void send(int rank, const Reply& reply, int file = -1);
  void await_ready(int rank);
  void wait_for(int socket, short events);
  void refuse(const Error& error);
  Error late() const;
  Error lost(int rank) const {
    return joining(ErrorCode::peer_lost, name_of(rank) + " died while the ranks of " + name_of(self_.job) + " met", 0,
                   rank);
  }

  const Membership& self_;
  Fd listener_;
  Deadline deadline_;
  std::chrono::nanoseconds timeout_;
  std::vector<Visitor> visitors_;  // connected, rank unknown
  std::vector<Visitor> ranks_;     // admitted
  CoreSet cores_;
  PidNamespace pids_ = PidNamespace::own();
  int admitted_ = 1;
};

void Host::gather() {
  while (admitted_ < self_.size) {
    std::vector<pollfd> polled{{listener_.get(), POLLIN, 0}};
    for (const Visitor& visitor : visitors_) polled.push_back({visitor.socket.get(), POLLIN, 0});
    for (const Visitor& guest : ranks_) polled.push_back({guest.socket.get(), 0, 0});  // negative ones are skipped
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline_ - Clock::now());
    if (left.count() <= 0) throw late();
    poll(polled.data(), polled.size(), static_cast<int>(std::min<std::int64_t>(left.count(), 1000)));
    check_presence();
    accept_visitors();
    for (Visitor& visitor : visitors_) hear(visitor);
    std::erase_if(visitors_, [](const Visitor& visitor) { return !visitor.socket; });
  }
}

void Host::accept_visitors() {
  for (;;) {
    Visitor visitor;
    visitor.socket = Fd(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!visitor.socket) {
      if (errno == EMFILE || errno == ENFILE) {
        throw joining(ErrorCode::io, "too many open files for so many ranks (see ulimit -n)", 0);
      }
      return;
    }
    const Credentials who = credentials(visitor.socket.get());
    if (who.user != geteuid()) continue;  // a stranger: hang up, without a word
    visitor.pid = who.pid;
    visitors_.push_back(std::move(visitor));
  }
}

void Host::hear(Visitor& visitor) {
  Hello hello;
  const Received received = receive_packet(visitor.socket.get(), writable_bytes_of(hello));
  if (received.what == Received::What::would_block) return;
  if (received.what == Received::What::closed || hello.magic != Hello::kMagic) {
    visitor.socket.reset();  // not one of us
    return;
  }
  admit(hello, visitor);
}

void Host::admit(const Hello& hello, Visitor& visitor) {
  const std::string who = "process " + std::to_string(visitor.pid);
  const auto differs = [&](const std::string& what) {
    return joining(ErrorCode::mismatch, who + " (" + name_of(hello.rank) + ") " + what, hello.rank, 0);
  };
  if (hello.version != Hello::kVersion || hello.layout != layout_of_memory()) {
    throw differs("runs another version of expar than rank 0");
  }
  if (hello.size != self_.size) {
    throw differs("says that " + name_of(self_.job) + " has " + std::to_string(hello.size) + " ranks; rank 0 says " +
                  std::to_string(self_.size));
  }
  if (hello.mapping != (self_.mapping ? 1U : 0U)) throw differs("disagrees with rank 0 on whether memory is mapped");
  if (hello.rank < 0 || hello.rank >= self_.size) {
    throw joining(ErrorCode::bad_argument,
                  who + " says it is " + name_of(hello.rank) + " of " + std::to_string(self_.size), hello.rank);
  }
  Visitor& seat = ranks_[static_cast<std::size_t>(hello.rank)];
  if (hello.rank == 0 || seat.socket) {
    const pid_t other = hello.rank == 0 ? getpid() : seat.pid;
    throw joining(ErrorCode::bad_argument,
                  "processes " + std::to_string(other) + " and " + std::to_string(visitor.pid) + " both say they are " +
                      name_of(hello.rank) + " of " + name_of(self_.job),
                  hello.rank);
  }
  for (std::size_t i = 0; i < cores_.size(); ++i) cores_[i] |= hello.cores[i];
  seat = std::move(visitor);
  seat.pids = hello.pids;
  ++admitted_;
}

void Host::check_presence() {
  for (int rank = 1; rank < self_.size; ++rank) {
    pollfd polled{ranks_[static_cast<std::size_t>(rank)].socket.get(), 0, 0};
    if (polled.fd >= 0 && poll(&polled, 1, 0) > 0) throw lost(rank);
  }
}

Meeting Host::hand_out() {
  Meeting meeting;
  meeting.mesh.resize(ranks_.size());
  meeting.pids.resize(ranks_.size());
  meeting.cores = Cores{.allowed = count(cores_), .quota = core_quota()}.usable();
  meeting.memory = make_sealed(bytes_of_memory(self_));
  for (int rank = 1; rank < self_.size; ++rank) {
    meeting.pids[static_cast<std::size_t>(rank)] = ranks_[static_cast<std::size_t>(rank)].pid;
    send(rank, {.kind = Reply::Kind::memory, .cores = static_cast<std::uint32_t>(meeting.cores)}, meeting.memory.get());
  }
  // One pair at a time: all of them at once are size^2 descriptors.
  for (int a = 0; a < self_.size; ++a) {
    for (int b = a + 1; b < self_.size; ++b) {
      int ends[2];
      if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) != 0) {
        throw joining(ErrorCode::io, "cannot make a socket: " + std::generic_category().message(errno), 0);
      }
      Fd end_a(ends[0]);
      const Fd end_b(ends[1]);
      send(b, {.kind = Reply::Kind::peer, .peer = a, .pid = pid_for(b, a)}, end_b.get());
      if (a == 0) {
        meeting.mesh[static_cast<std::size_t>(b)] = std::move(end_a);
      } else {
        send(a, {.kind = Reply::Kind::peer, .peer = b, .pid = pid_for(a, b)}, end_a.get());
      }
    }
  }
  for (int rank = 1; rank < self_.size; ++rank) await_ready(rank);
  for (int rank = 1; rank < self_.size; ++rank) send(rank, {.kind = Reply::Kind::go});
  return meeting;
}

/// The kernel told rank 0 the numbers; to a guest in another namespace they would name strangers.
pid_t Host::pid_for(int guest, int peer) const {
  if (!pids_.known() || ranks_[static_cast<std::size_t>(guest)].pids != pids_) return 0;
  return peer == 0 ? getpid() : ranks_[static_cast<std::size_t>(peer)].pid;
}

void Host::send(int rank, const Reply& reply, int file) {
  const int socket = ranks_[static_cast<std::size_t>(rank)].socket.get();
  for (;;) {
    switch (send_packet(socket, bytes_of(reply), file)) {
      case Sent::yes:
        return;
      case Sent::closed:
        throw lost(rank);
      case Sent::would_block:
        if (Clock::now() >= deadline_) {
          throw joining(ErrorCode::timeout, name_of(rank) + " is late: it does not go on joining", 0, rank);
        }
        wait_for(socket, POLLOUT);
    }
  }
}

void Host::await_ready(int rank) {
  const int socket = ranks_[static_cast<std::size_t>(rank)].socket.get();
  for (;;) {
    Ready ready;
    const Received received = receive_packet(socket, writable_bytes_of(ready));
    if (received.what == Received::What::packet) return;
    if (received.what == Received::What::closed) throw lost(rank);
    if (Clock::now() >= deadline_) {
      throw joining(
          ErrorCode::timeout,
          name_of(rank) + " is late: rank 0 has waited " + local::seconds(timeout_) + " for it to finish joining", 0,
          rank);
    }
    wait_for(socket, POLLIN);
  }
}

void Host::wait_for(int socket, short events) {
  pollfd polled{socket, events, 0};
  poll(&polled, 1, 10);
}

Error Host::late() const {
  std::vector<int> missing;
  for (int rank = 1; rank < self_.size; ++rank) {
    if (!ranks_[static_cast<std::size_t>(rank)].socket) missing.push_back(rank);
  }
  return joining(ErrorCode::timeout,
                 local::rank_names(missing) + (missing.size() == 1 ? " is" : " are") + " late: rank 0 has waited " +
                     local::seconds(timeout_) + " for all " + std::to_string(self_.size) + " ranks of " +
                     name_of(self_.job) + " to start on this host",
                 0, missing.front());
}

void Host::refuse(const Error& error) {
  Reply reply{.kind = Reply::Kind::refusal,
              .peer = error.peer(),
              .code = static_cast<std::uint32_t>(error.code()),
              .rank = error.rank()};
  error.message().copy(reply.text.data(), reply.text.size() - 1);
  for (const auto* crowd : {&ranks_, &visitors_}) {
    for (const Visitor& visitor : *crowd) {
      if (!visitor.socket) continue;
      try {
        send_packet(visitor.socket.get(), bytes_of(reply));
      } catch (const Error&) {  // whoever cannot be told will notice the hangup
      }
    }
  }
}

}  // namespace

std::optional<Meeting> host(const Membership& self, Deadline deadline, std::chrono::nanoseconds timeout) {
  Fd listener = make_socket();
  const Address address(self.job);
  if (bind(listener.get(), reinterpret_cast<const sockaddr*>(&address.name), address.bytes) != 0) {
    if (errno == EADDRINUSE) return std::nullopt;
    throw joining(ErrorCode::io, "cannot open the meeting point: " + std::generic_category().message(errno), 0);
  }
  if (listen(listener.get(), self.size) != 0) {
    throw joining(ErrorCode::io, "cannot open the meeting point: " + std::generic_category().message(errno), 0);
  }
  return Host(self, std::move(listener), deadline, timeout).run();
}

}  // namespace expar::shm
