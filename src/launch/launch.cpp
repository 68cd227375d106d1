// launch(): runs the ranks of a job as child processes and says why the job failed, if it did.
#include <poll.h>
#include <sys/random.h>
#include <sys/wait.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <optional>

#include <expar/registry.h>

#include "src/launch/processes.h"
#include "src/launch/report.h"
#include "src/launch/root_cause.h"
#include "src/launch/signals.h"

namespace expar {
namespace {

using launch_detail::Ending;
using launch_detail::HeldSignals;
using launch_detail::Processes;
using launch_detail::Report;
using launch_detail::ReportChannel;
using Clock = std::chrono::steady_clock;

/// After the first failure the other ranks have this long to notice and to say what they know.
constexpr std::chrono::seconds kGrace{5};
/// How often ended children are looked for where the system cannot signal them.
constexpr std::chrono::milliseconds kWithoutPidfds{20};

std::string random_id() {
  std::array<unsigned char, 16> bytes{};
  if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    throw Error(ErrorCode::io, "the system gives no random numbers", {.operation = "launch"});
  }
  std::string text;
  for (const unsigned char byte : bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

/// One job from its first to its last process.
class Watch {
 public:
  Watch(int ranks, const launch_detail::Start& start, ReportChannel& channel, HeldSignals& signals)
      : channel_(channel), signals_(signals), processes_(ranks, start) {}

  /// Returns once no process is left.
  void run() {
    while (processes_.running() > 0) {
      wait();
      forward_signals();
      collect();
      if (failed() && !kill_at_) kill_at_ = Clock::now() + kGrace;
      if (kill_at_ && Clock::now() >= *kill_at_) break;
    }
    processes_.end();
    take_reports();
  }

  bool failed() const { return !reports_.empty() || !endings_.empty(); }
  /// The signal that ended the job, or 0.
  int interrupted_by() const { return interrupted_by_; }
  Error root_cause() const { return launch_detail::root_cause(reports_, endings_); }

 private:
  void wait() {
    std::vector<pollfd> fds{{signals_.fd(), POLLIN, 0}, {channel_.fd(), POLLIN, 0}};
    for (const int fd : processes_.pidfds()) fds.push_back({fd, POLLIN, 0});
    using std::chrono::milliseconds;
    milliseconds limit{-1};
    if (kill_at_) {
      const auto left = std::chrono::ceil<milliseconds>(*kill_at_ - Clock::now());
      limit = std::max(left, milliseconds{0});
    }
    if (processes_.pidfds().empty()) {
      limit = limit.count() < 0 ? kWithoutPidfds : std::min(limit, kWithoutPidfds);
    }
    poll(fds.data(), fds.size(), static_cast<int>(limit.count()));
  }

  void forward_signals() {
    for (const int signal : signals_.take()) {
      processes_.signal(signal);
      interrupted_by_ = signal;
      if (!kill_at_) kill_at_ = Clock::now() + kGrace;
    }
  }

  void collect() {
    std::vector<Ending> ended;
    for (const Processes::Exit& exit : processes_.reap()) {
      const bool killed = WIFSIGNALED(exit.status);
      const Ending ending{.rank = exit.rank,
                          .signal = killed ? WTERMSIG(exit.status) : 0,
                          .status = killed ? 0 : WEXITSTATUS(exit.status)};
      if (ending.signal != 0 || ending.status != 0) ended.push_back(ending);
    }
    // Among ranks that ended at the same time, the killed one is the cause.
    std::stable_partition(ended.begin(), ended.end(), [](const Ending& e) { return e.signal != 0; });
    endings_.insert(endings_.end(), ended.begin(), ended.end());
    take_reports();
  }

  /// After the reaping: what a rank said before it ended is here by now.
  void take_reports() {
    for (Report& report : channel_.receive()) reports_.push_back(std::move(report));
    for (Ending& ending : endings_) {
      for (const Report& report : reports_) ending.reported |= report.from == ending.rank;
    }
  }

  ReportChannel& channel_;
  HeldSignals& signals_;
  Processes processes_;
  std::vector<Report> reports_;
  std::vector<Ending> endings_;
  std::optional<Clock::time_point> kill_at_;
  int interrupted_by_ = 0;
};

}  // namespace

std::optional<Error> launch(int ranks, const std::vector<std::string>& command) {
  if (ranks < 1) {
    throw Error(ErrorCode::bad_argument, std::to_string(ranks) + " ranks cannot be started", {.operation = "launch"});
  }
  if (command.empty() || command.front().empty()) {
    throw Error(ErrorCode::bad_argument, "no program to start", {.operation = "launch"});
  }
  HeldSignals signals;
  ReportChannel channel;
  try {
    Watch job(ranks,
              {.command = command,
               .job = random_id(),
               .report_variable = channel.variable(),
               .report_fd = channel.child_end(),
               .signals = signals.mask_before()},
              channel, signals);
    job.run();
    if (!job.failed()) return std::nullopt;
    // The signal was for the caller too; it takes effect when the hold ends, with no child left.
    if (job.interrupted_by() != 0) HeldSignals::put_back(job.interrupted_by());
    return job.root_cause();
  } catch (const Error& error) {
    return error;
  }
}

}  // namespace expar
