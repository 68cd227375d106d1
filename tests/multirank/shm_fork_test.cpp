// Ranks that fork, and ranks that see each other's process numbers through different namespaces.
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <expar/collectives.h>
#include <expar/operation.h>
#include <expar/plan.h>
#include <expar/registry.h>

#include "tests/contract/transport_suite.h"
#include "transports/shm/rendezvous.h"
#include "transports/shm/shm.h"

namespace expar::test {
namespace {

using std::chrono::seconds;

int status_of(pid_t child) {
  int status = -1;
  waitpid(child, &status, 0);
  return status;
}

TEST(ShmFork, a_child_that_destroys_its_copies_harms_nobody) {
  const std::string job = fresh_job_id();
  expect_success(fork_ranks(3, [&](int rank) {
    Communicator communicator(shm::connect({job, rank, 3}, seconds(20)), {seconds(20)});
    std::optional<Context> context(std::in_place, communicator, ContextOptions{.threads = 2, .backend = "reference"});
    std::vector<std::int32_t> ids{0, 1, 2, 3};
    std::optional<PendingPlan> pending = start_plan(*context, ConstTensor(ids.data(), Shape{2, 2}), {.experts = 4});
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      pending.reset();
      context.reset();
      communicator = Communicator();
      _exit(0);
    }
    EXPECT_EQ(status_of(child), 0);
    // Long enough for those who wait for it to look whether it is still there.
    if (rank == 0) std::this_thread::sleep_for(std::chrono::milliseconds(100));
    EXPECT_EQ(pending->finish().tokens(), 2);
    for (int i = 0; i < 10; ++i) barrier(*context);
  }));
}

constexpr int kRefused = 77;

/// Runs `rank_main` as the first process of a new pid namespace. False where the system refuses to make one.
bool in_new_pid_namespace(const std::function<void()>& rank_main) {
  // After its first process has ended nobody can be started in the namespace: so a child makes it, not this process.
  const pid_t maker = fork();
  if (maker == 0) {
    if (unshare(CLONE_NEWPID) != 0) _exit(kRefused);
    const pid_t first = fork();
    if (first != 0) _exit(status_of(first) == 0 ? 0 : 1);
    alarm(30);
    rank_main();
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  const int status = status_of(maker);
  const bool refused = WIFEXITED(status) && WEXITSTATUS(status) == kRefused;
  if (!refused) {
    EXPECT_EQ(status, 0);
  }
  return !refused;
}

TEST(ShmFork, process_numbers_are_believed_only_within_one_pid_namespace) {
  if (getuid() != 0) GTEST_SKIP() << "only root can make a pid namespace";
  const std::string job = fresh_job_id();
  Shared<std::array<std::array<pid_t, 3>, 3>> pids;
  Shared<bool> refused;
  const auto ends = fork_ranks(3, [&](int rank) {
    const auto meet = [&] {
      const shm::Meeting meeting = shm::meet({job, rank, 3}, seconds(5));
      for (std::size_t peer = 0; peer < 3; ++peer) (*pids)[static_cast<std::size_t>(rank)][peer] = meeting.pids[peer];
    };
    if (rank != 1) return meet();
    *refused = !in_new_pid_namespace(meet);
  });
  if (*refused) GTEST_SKIP() << "the system refuses to make a pid namespace";
  expect_success(ends);
  EXPECT_GT((*pids)[0][1], 0) << "the kernel tells rank 0 in its own numbers";
  EXPECT_GT((*pids)[0][2], 0);
  EXPECT_EQ((*pids)[2][1], (*pids)[0][1]);
  EXPECT_GT((*pids)[2][0], 0);
  EXPECT_EQ((*pids)[1][0], 0) << "the number would name a stranger";
  EXPECT_EQ((*pids)[1][2], 0);
}

TEST(ShmFork, a_death_in_another_pid_namespace_is_noticed) {
  if (getuid() != 0) GTEST_SKIP() << "only root can make a pid namespace";
  const std::string job = fresh_job_id();
  Shared<bool> refused, noticed;
  fork_ranks(2, [&](int rank) {
    const auto survive = [&] {
      const auto transport = shm::connect({job, rank, 2}, seconds(5));
      barrier(*transport, 1);
      if (rank == 0) raise(SIGKILL);
      const Error error = error_of([&] { transport->wait([] { return false; }, for_test(0, seconds(10))); });
      *noticed = error.code() == ErrorCode::peer_lost && error.peer() == 0;
    };
    if (rank == 0) return survive();
    *refused = !in_new_pid_namespace(survive);
  });
  if (*refused) GTEST_SKIP() << "the system refuses to make a pid namespace";
  EXPECT_TRUE(*noticed);
}

}  // namespace
}  // namespace expar::test
