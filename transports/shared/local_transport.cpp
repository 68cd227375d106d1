// Publishing, waiting and failing together.
#include "transports/shared/local_transport.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "src/util/processor.h"
#include "transports/shared/board.h"
#include "transports/shared/cause.h"
#include "transports/shared/futex.h"
#include "transports/shared/wording.h"

namespace expar::local {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

/// How long a rank stays awake after the last sign of life. Waking a sleeper costs about 16 us (a virtual CPU that
/// idles must be started by the host), so staying awake for a few times that costs little and usually saves it.
constexpr Clock::duration kAwake = microseconds(50);
/// Where ranks share a core, awake means yielding; a rank that computes gets the core for a whole time slice meanwhile.
constexpr Clock::duration kAwakeYielding = microseconds(100);
/// How often deaths and the deadline are looked for; a death is to be noticed within 50 ms.
constexpr Clock::duration kCheck = milliseconds(1);
constexpr Clock::duration kSleep = milliseconds(10);
/// Turns of the waiting loop between two looks at the clock (about 20 ns each).
constexpr unsigned kSpinsPerClock = 32;
constexpr unsigned kYieldsPerClock = 4;
/// Also where every rank has a core, other programs may want it, or the kernel may have put two ranks on one. A yield
/// costs 0.3 us if nobody does; not to yield would hold up the very rank that is waited for.
constexpr unsigned kSpinsPerYield = 64;

Deadline deadline_after(Deadline start, Clock::duration limit) {
  return limit > Deadline::max() - start ? Deadline::max() : start + limit;
}

}  // namespace

/// Marks this rank as asleep while it lives, so that whoever has news rings.
class LocalTransport::Sleep {
 public:
  explicit Sleep(const LocalTransport& transport)
      : job_(transport.job_), bell_(transport.self().bell), heard_(bell_.rings.load()) {
    bell_.asleep.store(1);
    job_.head().sleepers.fetch_add(1);
  }
  ~Sleep() {
    job_.head().sleepers.fetch_sub(1);
    bell_.asleep.store(0);
  }
  Sleep(const Sleep&) = delete;
  Sleep& operator=(const Sleep&) = delete;
  void until_rung(Clock::duration limit) const { futex_wait(bell_.rings, heard_, limit); }

 private:
  const JobMemory& job_;
  Doorbell& bell_;
  std::uint32_t heard_;
};

LocalTransport::LocalTransport(std::string_view name, int rank, const JobMemory& job, int cores,
                               std::unique_ptr<Messages> messages)
    : Transport(name, rank, job.size()),
      job_(job),
      messages_(std::move(messages)),
      spins_(job.size() <= cores),
      owner_(getpid()) {}

void LocalTransport::publish(int index, const Line& line, std::string_view text) {
  flush_streamed_stores();
  const auto bit = static_cast<std::size_t>(index);
  if (!text.empty() || has_text_[bit]) write_text(self(), index, text);
  has_text_[bit] = !text.empty();
  write_line(self(), index, line);
  ring_bells(job_, rank());
}

Line LocalTransport::peek(int peer, int index) const { return read_line(job_.of(peer), index); }

std::string LocalTransport::text(int peer, int index) const { return read_text(job_.of(peer), index); }

std::optional<Error> LocalTransport::failure() const { return cause(job_); }

Error LocalTransport::abort(const Error& cause) {
  // The destructor of an unfinished operation comes here too, in a forked child with a copy of it: the rank goes on.
  if (forked()) return cause;
  return set_cause(job_, rank(), cause);
}

bool LocalTransport::forked() const { return getpid() != owner_; }

void LocalTransport::check() const {
  if (auto error = failure()) throw *error;
}

void LocalTransport::leave() {
  if (forked()) return;
  self().presence.store(std::uncaught_exceptions() > 0 ? Presence::left_in_exception : Presence::left);
  ring_bells(job_, rank());
}

// ---- messages

Transport::Ticket LocalTransport::start(std::span<const Message> messages) {
  check();
  try {
    return messages_->start(messages);
  } catch (const Error& error) {
    throw abort(error);
  }
}

bool LocalTransport::test(Ticket ticket) {
  advance_messages();
  if (messages_->take_complete(ticket)) return true;
  check();
  return false;
}

bool LocalTransport::advance_messages() {
  // Where the job has failed, the operations that posted these may be gone, and their memory with them.
  if (messages_->idle() || job_.head().cause.load() != 0) return false;
  try {
    return messages_->advance();
  } catch (const Error& error) {
    throw abort(error);
  }
}

// ---- waiting

void LocalTransport::wait_until(FunctionRef<bool()> done, const Waiting& waiting) {
  if (done()) return;
  const Deadline start = Clock::now();
  const Deadline deadline = deadline_after(start, waiting.limit);
  const unsigned turns_per_clock = spins_ ? kSpinsPerClock : kYieldsPerClock;
  const Clock::duration awake = spins_ ? kAwake : kAwakeYielding;
  Deadline last_sign = start;
  Deadline last_check = start;
  bool moved = false;
  for (unsigned turn = 1;; ++turn) {
    moved |= advance_messages();
    if (done()) return;
    check();
    if (spins_ && turn % kSpinsPerYield != 0) {
      pause();
    } else {
      sched_yield();
    }
    if (turn % turns_per_clock != 0) continue;

    Deadline now = Clock::now();
    if (moved) last_sign = now;
    moved = false;
    if (now - last_sign >= awake) {
      if (sleep(done, std::min(kSleep, deadline - now))) return;
      now = Clock::now();
      // Where ranks share cores, staying awake after every ring would take them from the ranks that work.
      if (spins_) last_sign = now;
    }
    if (now - last_check >= kCheck || now >= deadline) {
      if (done_or_lost(done, waiting, deadline)) return;
      last_check = now;
    }
  }
}

// Sleeps unless something has happened; true if done() is.
bool LocalTransport::sleep(FunctionRef<bool()> done, Clock::duration limit) {
  const Sleep sleep(*this);
  // Looked at again now that everyone can see that this rank needs a ring.
  if (advance_messages()) return false;
  if (done()) return true;
  if (job_.head().cause.load() == 0) sleep.until_rung(limit);
  return false;
}

// True if done() is, false if there is reason to wait on; throws otherwise.
bool LocalTransport::done_or_lost(FunctionRef<bool()> done, const Waiting& waiting, Deadline deadline) {
  const auto lost = find_lost(waiting, deadline);
  if (!lost) return false;
  // What a rank did before it left or died counts: look once more, now that nothing can follow.
  while (advance_messages()) {
  }
  if (done()) return true;
  throw abort(*lost);
}

std::optional<Error> LocalTransport::find_lost(const Waiting& waiting, Deadline deadline) {
  if (const auto dead = find_dead()) return died(rank(), dead->rank, dead->trace, waiting);
  if (waiting.peer >= 0 && waiting.peer != rank()) {
    const Presence presence = job_.of(waiting.peer).presence.load();
    if (presence == Presence::left || presence == Presence::left_in_exception) {
      return gone(rank(), waiting.peer, presence == Presence::left_in_exception, waiting);
    }
  }
  if (Clock::now() >= deadline) return late(rank(), size(), waiting);
  return std::nullopt;
}

}  // namespace expar::local
