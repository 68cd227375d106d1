// launch(): what it starts, what it says when ranks fail, and that it leaves nothing behind.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <expar/registry.h>
#include <gtest/gtest.h>

#include "tests/directory.h"

namespace expar {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

std::vector<std::string> rank_program(std::vector<std::string> orders) {
  orders.insert(orders.begin(), FAILING_RANK);
  return orders;
}

std::optional<Error> run(int ranks, std::vector<std::string> orders) {
  return launch(ranks, rank_program(std::move(orders)));
}

Error error_of(const std::optional<Error>& result) {
  EXPECT_TRUE(result.has_value()) << "nothing failed";
  return result.value_or(Error(ErrorCode::internal, "nothing failed"));
}

std::string code(ErrorCode value) { return std::to_string(static_cast<int>(value)); }

class Launch : public InDirectory {
 protected:
  pid_t wait_for_pid(const std::string& file) const {
    const auto end = steady_clock::now() + seconds(30);
    for (pid_t pid = 0; steady_clock::now() < end;) {
      if (std::ifstream(path(file)) >> pid) return pid;
      std::this_thread::sleep_for(milliseconds(5));
    }
    ADD_FAILURE() << file << " was never written";
    return 0;
  }

  static void expect_gone(pid_t pid) {
    const auto end = steady_clock::now() + seconds(10);
    while (runs(pid) && steady_clock::now() < end) std::this_thread::sleep_for(milliseconds(5));
    EXPECT_FALSE(runs(pid)) << "process " << pid << " is still there";
  }

  /// False for a process that has ended, whether or not init has noticed.
  static bool runs(pid_t pid) {
    std::string stat;
    std::getline(std::ifstream("/proc/" + std::to_string(pid) + "/stat"), stat);
    return !stat.empty() && stat.substr(stat.rfind(')')).substr(0, 3) != ") Z";
  }
};

TEST_F(Launch, succeeds_when_every_rank_does) { EXPECT_FALSE(run(3, {"*:stdin"})); }

TEST_F(Launch, tells_each_rank_its_number) {
  ASSERT_FALSE(run(3, {"*:pid:" + directory_}));
  EXPECT_NE(wait_for_pid("0"), wait_for_pid("1"));
  EXPECT_NE(wait_for_pid("1"), wait_for_pid("2"));
}

TEST_F(Launch, gives_stdin_to_rank_0_alone) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  ASSERT_EQ(write(ends[1], "text", 4), 4);
  close(ends[1]);
  const int before = dup(STDIN_FILENO);
  dup2(ends[0], STDIN_FILENO);
  EXPECT_FALSE(run(2, {"1:stdin"}));
  const Error error = error_of(run(2, {"0:stdin"}));
  dup2(before, STDIN_FILENO);
  close(before);
  close(ends[0]);
  EXPECT_EQ(error.message(), "rank 0 exited with status 9");
}

TEST_F(Launch, hands_over_the_error_of_a_rank) {
  const Error error = error_of(run(3, {"1:report:" + code(ErrorCode::mismatch) + ":2"}));
  EXPECT_EQ(error.code(), ErrorCode::mismatch);
  EXPECT_EQ(error.rank(), 1);
  EXPECT_EQ(error.peer(), 2);
  EXPECT_STREQ(error.what(), "rank 1: dispatch: as told");
}

TEST_F(Launch, names_a_killed_rank_and_what_the_others_were_doing) {
  const std::string lost = "report:" + code(ErrorCode::peer_lost) + ":2";
  const Error error = error_of(run(4, {"2:kill:9", "*:sleep:0.2", "0:" + lost, "1:" + lost, "3:" + lost}));
  EXPECT_EQ(error.code(), ErrorCode::peer_lost);
  EXPECT_EQ(error.peer(), 2);
  EXPECT_EQ(error.operation(), "dispatch");
  EXPECT_EQ(error.message(), "rank 2 was killed by signal 9 (SIGKILL)");
}

TEST_F(Launch, prefers_a_first_cause_to_a_loss_that_was_reported_before) {
  const Error error = error_of(run(
      2, {"0:report:" + code(ErrorCode::peer_lost) + ":1", "1:sleep:0.2", "1:report:" + code(ErrorCode::no_memory)}));
  EXPECT_EQ(error.code(), ErrorCode::no_memory);
  EXPECT_EQ(error.rank(), 1);
}

TEST_F(Launch, prefers_a_killed_rank_to_the_timeout_of_another) {
  const Error error = error_of(run(2, {"0:sleep:0.1", "0:report:" + code(ErrorCode::timeout) + ":1", "1:kill:11"}));
  EXPECT_EQ(error.message(), "rank 1 was killed by signal 11 (SIGSEGV)");
}

TEST_F(Launch, says_how_a_silent_rank_exited) {
  const Error error = error_of(run(2, {"1:exit:3"}));
  EXPECT_EQ(error.code(), ErrorCode::internal);
  EXPECT_EQ(error.message(), "rank 1 exited with status 3");
}

TEST_F(Launch, ends_ranks_that_go_on_after_a_failure) {
  const auto start = steady_clock::now();
  const Error error = error_of(run(3, {"*:pid:" + directory_, "1:report:0", "*:sleep:100"}));
  EXPECT_EQ(error.code(), ErrorCode::bad_argument);
  EXPECT_LT(steady_clock::now() - start, seconds(30));
  expect_gone(wait_for_pid("0"));
  expect_gone(wait_for_pid("2"));
}

TEST_F(Launch, names_a_program_that_cannot_be_started) {
  const Error error = error_of(launch(2, {"/nowhere/program"}));
  EXPECT_EQ(error.code(), ErrorCode::io);
  EXPECT_EQ(error.message(), "cannot start /nowhere/program: No such file or directory");
}

TEST_F(Launch, refuses_no_ranks_and_no_program) {
  EXPECT_THROW(launch(0, {"true"}), Error);
  EXPECT_THROW(launch(1, {}), Error);
}

TEST_F(Launch, ends_what_a_rank_leaves_behind) {
  ASSERT_FALSE(run(2, {"1:child:" + path("child")}));
  expect_gone(wait_for_pid("child"));
}

TEST_F(Launch, leaves_other_children_of_the_caller_alone) {
  const pid_t other = fork();
  if (other == 0) {
    sleep(100);
    _exit(0);
  }
  EXPECT_FALSE(run(2, {}));
  EXPECT_EQ(waitpid(other, nullptr, WNOHANG), 0);
  kill(other, SIGKILL);
  waitpid(other, nullptr, 0);
}

/// A launcher in a process of its own, to be killed.
pid_t start_launcher(const std::vector<std::string>& orders) {
  const pid_t pid = fork();
  if (pid == 0) {
    const std::optional<Error> error = run(3, orders);
    _exit(error ? exit_code(error->code()) : 0);
  }
  return pid;
}

TEST_F(Launch, takes_its_ranks_along_when_it_is_killed) {
  const pid_t launcher = start_launcher({"*:deaf", "*:pid:" + directory_, "*:sleep:100"});
  const pid_t ranks[] = {wait_for_pid("0"), wait_for_pid("1"), wait_for_pid("2")};
  kill(launcher, SIGKILL);
  waitpid(launcher, nullptr, 0);
  for (const pid_t rank : ranks) expect_gone(rank);
}

TEST_F(Launch, passes_a_request_to_stop_on_and_then_follows_it) {
  const pid_t launcher = start_launcher({"*:pid:" + directory_, "*:sleep:100"});
  const pid_t ranks[] = {wait_for_pid("0"), wait_for_pid("1"), wait_for_pid("2")};
  kill(launcher, SIGTERM);
  int status = 0;
  waitpid(launcher, &status, 0);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM) << status;
  for (const pid_t rank : ranks) expect_gone(rank);
}

TEST_F(Launch, kills_ranks_that_do_not_stop_when_asked) {
  const pid_t launcher = start_launcher({"1:deaf", "*:pid:" + directory_, "*:sleep:100"});
  const pid_t deaf = wait_for_pid("1");
  kill(launcher, SIGTERM);
  waitpid(launcher, nullptr, 0);
  expect_gone(deaf);
}

TEST_F(Launch, reports_nothing_without_a_launcher) {
  report_error(Error(ErrorCode::io, "nobody listens"));
  // A number that belongs to something else by now must not be written to.
  setenv("EXPAR_REPORT_FD", "2:1", 1);
  report_error(Error(ErrorCode::io, "nobody listens"));
  unsetenv("EXPAR_REPORT_FD");
}

}  // namespace
}  // namespace expar
