// Forks ranks, collects how they end through pipes, and gives up on those that hang.
#include "tests/multirank/processes.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <exception>

// Present under AddressSanitizer only: a child leaves by _exit, which looks for no leaks by itself.
extern "C" int __lsan_do_recoverable_leak_check() __attribute__((weak));

namespace expar::test {
namespace {

// ---- What a child tells its parent: fields one after another, each with its length.

void put(std::string& to, std::string_view field) {
  const std::uint64_t size = field.size();
  to.append(reinterpret_cast<const char*>(&size), sizeof size);
  to.append(field);
}

std::string get(std::string_view& from) {
  std::uint64_t size = 0;
  if (from.size() < sizeof size) return {};
  std::memcpy(&size, from.data(), sizeof size);
  from.remove_prefix(sizeof size);
  std::string field(from.substr(0, size));
  from.remove_prefix(std::min<std::size_t>(size, from.size()));
  return field;
}

std::string encode(const Outcome& outcome) {
  std::string text;
  put(text, outcome.returned ? "returned" : "threw");
  put(text, outcome.failures);
  if (outcome.error) {
    put(text, std::to_string(static_cast<int>(outcome.error->code())));
    put(text, std::to_string(outcome.error->rank()));
    put(text, std::to_string(outcome.error->peer()));
    put(text, outcome.error->operation());
    put(text, outcome.error->message());
  }
  return text;
}

void decode(std::string_view text, Outcome& outcome) {
  if (text.empty()) return;
  outcome.returned = get(text) == "returned";
  outcome.failures = get(text);
  if (text.empty()) return;
  const auto code = static_cast<ErrorCode>(std::stoi(get(text)));
  const int rank = std::stoi(get(text));
  const int peer = std::stoi(get(text));
  const std::string operation = get(text);
  outcome.error.emplace(code, get(text), Error::Where{rank, peer, operation});
}

// ---- The child

class Recorder : public ::testing::EmptyTestEventListener {
 public:
  explicit Recorder(std::string& to) : to_(to) {}
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (!result.failed()) return;
    to_ += std::string(result.file_name() == nullptr ? "?" : result.file_name()) + ":" +
           std::to_string(result.line_number()) + ": " + result.message() + "\n";
  }

 private:
  std::string& to_;
};

[[noreturn]] void be_child(int rank, int pipe, const std::function<void(int)>& rank_main) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  std::string failures;
  auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
  delete listeners.Release(listeners.default_result_printer());
  listeners.Append(new Recorder(failures));
  Outcome outcome = end_of([&] { rank_main(rank); });
  outcome.failures = std::move(failures);
  if (__lsan_do_recoverable_leak_check != nullptr && __lsan_do_recoverable_leak_check() != 0) {
    outcome.failures += "memory leaked\n";
  }
  const std::string text = encode(outcome);
  for (std::size_t sent = 0; sent < text.size();) {
    const ssize_t n = write(pipe, text.data() + sent, text.size() - sent);
    if (n <= 0) _exit(125);
    sent += static_cast<std::size_t>(n);
  }
  _exit(0);
}

// ---- The parent

struct Child {
  pid_t pid = -1;
  int pipe = -1;
  std::string said;
};

// Reads one pipe as far as it goes; closes it at its end.
void listen(Child& child) {
  std::array<char, 4096> buffer{};
  const ssize_t n = read(child.pipe, buffer.data(), buffer.size());
  if (n > 0) {
    child.said.append(buffer.data(), static_cast<std::size_t>(n));
  } else {
    close(child.pipe);
    child.pipe = -1;
  }
}

// True once every child has closed its pipe, as its death does.
bool listen_to_all(std::vector<Child>& children, Deadline deadline) {
  for (;;) {
    std::vector<pollfd> polled;
    for (const Child& child : children) {
      if (child.pipe >= 0) polled.push_back({child.pipe, POLLIN, 0});
    }
    if (polled.empty()) return true;
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    if (left.count() <= 0) return false;
    poll(polled.data(), polled.size(), static_cast<int>(left.count()));
    for (Child& child : children) {
      for (const pollfd& entry : polled) {
        if (entry.fd == child.pipe && entry.revents != 0 && child.pipe >= 0) {
          listen(child);
          break;
        }
      }
    }
  }
}

}  // namespace

Outcome end_of(const std::function<void()>& run) {
  Outcome outcome;
  try {
    run();
    outcome.returned = true;
  } catch (const Error& error) {
    outcome.error = error;
  } catch (const std::exception& error) {
    outcome.error.emplace(ErrorCode::internal, error.what());
  }
  return outcome;
}

std::vector<Outcome> fork_ranks(int ranks, const std::function<void(int)>& rank_main,
                                std::chrono::nanoseconds patience) {
  std::vector<Child> children(static_cast<std::size_t>(ranks));
  std::fflush(nullptr);  // or children would write out what lies in the buffers once more
  for (int rank = 0; rank < ranks; ++rank) {
    int ends[2];
    if (pipe(ends) != 0) throw std::runtime_error("pipe failed");
    const pid_t pid = fork();
    if (pid < 0) throw std::runtime_error("fork failed");
    if (pid == 0) {
      close(ends[0]);
      for (const Child& older : children) {
        if (older.pipe >= 0) close(older.pipe);
      }
      be_child(rank, ends[1], rank_main);
    }
    close(ends[1]);
    children[static_cast<std::size_t>(rank)] = {pid, ends[0], {}};
  }

  const bool in_time = listen_to_all(children, Clock::now() + patience);
  std::vector<Outcome> outcomes(children.size());
  for (std::size_t rank = 0; rank < children.size(); ++rank) {
    Child& child = children[rank];
    Outcome& outcome = outcomes[rank];
    outcome.hung = !in_time && child.pipe >= 0;
    if (outcome.hung) kill(child.pid, SIGKILL);
    if (child.pipe >= 0) close(child.pipe);
    int status = 0;
    while (waitpid(child.pid, &status, 0) < 0 && errno == EINTR) {
    }
    decode(child.said, outcome);
    if (WIFSIGNALED(status)) outcome.signal = WTERMSIG(status);
    if (WIFEXITED(status)) outcome.exit_code = WEXITSTATUS(status);
  }
  return outcomes;
}

std::string fresh_job_id() {
  static std::atomic<int> count{0};
  return "test-" + std::to_string(getpid()) + "-" + std::to_string(count.fetch_add(1));
}

std::string RankSetup::name() const {
  const char* kinds[] = {"threads", "shm", "carried"};
  return std::string(kinds[static_cast<int>(kind)]) + "_" + std::to_string(ranks) +
         (mapping || kind == Kind::carried ? "" : "_unmapped") + (group ? "_group" : "");
}

std::ostream& operator<<(std::ostream& out, const RankSetup& setup) { return out << setup.name(); }

std::vector<RankSetup> all_setups(const std::vector<int>& ranks) {
#ifdef __SANITIZE_THREAD__
  constexpr int kMost = 3;  // it sees races within a process only, and more ranks are carried as three are
#else
  constexpr int kMost = 7;  // eight are as seven to all but threads, and dear to start
#endif
  std::vector<RankSetup> setups;
  for (Kind kind : {Kind::threads, Kind::shm, Kind::carried}) {
    for (int n : ranks) {
      if (kind != Kind::threads && n > kMost) continue;
      if (kind != Kind::carried) setups.push_back({.kind = kind, .ranks = n});
      // A rank always maps itself, and a carried one nobody else.
      if (n > 1 || kind == Kind::carried) setups.push_back({.kind = kind, .ranks = n, .mapping = false});
    }
  }
  return setups;
}

std::vector<RankSetup> all_communicators() {
  std::vector<RankSetup> setups = all_setups();
  setups.push_back({.ranks = 1, .group = true});
  for (const bool mapping : {true, false}) {
    for (const int n : {3, 4}) setups.push_back({.ranks = n, .mapping = mapping, .group = true});
    setups.push_back({.kind = Kind::shm, .ranks = 3, .mapping = mapping, .group = true});
  }
  setups.push_back({.kind = Kind::carried, .ranks = 3, .mapping = false, .group = true});
  return setups;
}

std::string Outcome::describe() const {
  std::string text;
  if (hung) return "hung";
  if (signal != 0) return "was killed by signal " + std::to_string(signal);
  if (error) text += "threw " + std::string(name(error->code())) + ": " + error->what();
  if (!error && !returned) text += "ended early with exit code " + std::to_string(exit_code);
  if (!failures.empty()) text += "\n" + failures;
  return text;
}

void expect_success(const std::vector<Outcome>& outcomes) {
  for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
    EXPECT_TRUE(outcomes[rank].ok()) << "rank " << rank << " " << outcomes[rank].describe();
  }
}

void expect_no_failures(const std::vector<Outcome>& outcomes) {
  for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
    EXPECT_FALSE(outcomes[rank].hung) << "rank " << rank << " hung";
    EXPECT_EQ(outcomes[rank].failures, "") << "rank " << rank;
  }
}

Error expect_same_error(const std::vector<Outcome>& outcomes, int but) {
  expect_no_failures(outcomes);
  std::optional<Error> first;
  for (std::size_t rank = 0; rank < outcomes.size(); ++rank) {
    if (static_cast<int>(rank) == but) continue;
    const auto& error = outcomes[rank].error;
    EXPECT_TRUE(error.has_value()) << "rank " << rank << " threw nothing: " << outcomes[rank].describe();
    if (!error) continue;
    if (!first) first = error;
    EXPECT_EQ(error->code(), first->code()) << "rank " << rank;
    EXPECT_EQ(error->rank(), first->rank()) << "rank " << rank;
    EXPECT_EQ(error->peer(), first->peer()) << "rank " << rank;
    EXPECT_STREQ(error->what(), first->what()) << "rank " << rank;
  }
  return first.value_or(Error(ErrorCode::internal, "no rank threw"));
}

}  // namespace expar::test
