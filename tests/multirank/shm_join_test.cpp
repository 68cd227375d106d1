// How processes find each other: who is missing, who disagrees, who does not belong, and that nothing is left open.
#include <expar/registry.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>

#include "tests/contract/transport_suite.h"
#include "transports/shm/fd.h"
#include "transports/shm/shm.h"

namespace expar::test {
namespace {

using shm::Membership;
using std::chrono::milliseconds;
using std::chrono::seconds;

void sleep_for(milliseconds time) { std::this_thread::sleep_for(time); }

std::size_t open_files() {
  const std::filesystem::directory_iterator files("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(files), end(files)));
}

TEST(ShmJoin, of_a_late_rank_0_succeeds) {
  const std::string job = fresh_job_id();
  expect_success(fork_ranks(3, [&](int rank) {
    if (rank == 0) sleep_for(milliseconds(120));
    const auto transport = shm::connect({job, rank, 3}, seconds(20));
    EXPECT_EQ(transport->rank(), rank);
    EXPECT_EQ(transport->size(), 3);
    EXPECT_EQ(transport->name(), "shm");
    barrier(*transport, 1);
  }));
}

TEST(ShmJoin, names_the_ranks_that_never_came) {
  const std::string job = fresh_job_id();
  const auto ends = fork_ranks(3, [&](int rank) { shm::connect({job, rank, 5}, milliseconds(300)); });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::timeout);
  EXPECT_EQ(error.peer(), 3);
  EXPECT_EQ(error.operation(), "join");
  EXPECT_EQ(error.message(), "ranks 3 and 4 are late: rank 0 has waited 0.3 s for all 5 ranks of job '" + job +
                                 "' to start on this host");
}

TEST(ShmJoin, names_rank_0_if_it_never_came) {
  const std::string job = fresh_job_id();
  const auto ends = fork_ranks(1, [&](int) { shm::connect({job, 1, 2}, milliseconds(200)); });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::timeout);
  EXPECT_EQ(error.peer(), 0);
}

TEST(ShmJoin, refuses_two_processes_of_one_rank) {
  for (int twice : {0, 1}) {
    const std::string job = fresh_job_id();
    const auto ends = fork_ranks(3, [&](int child) {
      // Children 0 and 1 are the ranks of these numbers; child 2 says it is one of them too.
      if (child == 2) sleep_for(milliseconds(50));
      shm::connect({job, child == 2 ? twice : child, 3}, seconds(5));
    });
    const Error error = expect_same_error(ends);
    EXPECT_EQ(error.code(), ErrorCode::bad_argument) << error.what();
    EXPECT_NE(error.message().find("both say they are rank " + std::to_string(twice)), std::string::npos);
  }
}

TEST(ShmJoin, refuses_ranks_that_disagree_on_the_job) {
  const std::string size = fresh_job_id();
  const Error sizes = expect_same_error(fork_ranks(2, [&](int rank) {
    shm::connect({size, rank, 2 + rank}, seconds(5));
  }));
  EXPECT_EQ(sizes.code(), ErrorCode::mismatch);
  EXPECT_NE(sizes.message().find("has 3 ranks; rank 0 says 2"), std::string::npos) << sizes.what();
  const std::string mapping = fresh_job_id();
  const Error mappings = expect_same_error(fork_ranks(2, [&](int rank) {
    shm::connect({mapping, rank, 2, rank == 0}, seconds(5));
  }));
  EXPECT_EQ(mappings.code(), ErrorCode::mismatch);
}

TEST(ShmJoin, refuses_a_rank_that_cannot_be) {
  EXPECT_EQ(error_of([] { shm::connect({"x", 2, 2}, seconds(1)); }).code(), ErrorCode::bad_argument);
  EXPECT_EQ(error_of([] { shm::connect({"x", -1, 2}, seconds(1)); }).code(), ErrorCode::bad_argument);
  EXPECT_EQ(error_of([] { shm::connect({"x", 0, 0}, seconds(1)); }).code(), ErrorCode::bad_argument);
}

TEST(ShmJoin, tells_all_when_a_rank_dies_while_they_meet) {
  const std::string job = fresh_job_id();
  const auto ends = fork_ranks(3, [&](int child) {
    const int rank = child == 2 ? 3 : child;  // rank 2 never comes
    if (rank == 3) ualarm(100'000, 0);        // dies of SIGALRM
    shm::connect({job, rank, 4}, seconds(10));
  });
  EXPECT_EQ(ends[2].signal, SIGALRM);
  const Error error = expect_same_error(ends, 2);
  EXPECT_EQ(error.code(), ErrorCode::peer_lost);
  EXPECT_EQ(error.peer(), 3);
}

TEST(ShmJoin, tells_all_when_rank_0_dies_while_they_meet) {
  const std::string job = fresh_job_id();
  const auto ends = fork_ranks(2, [&](int rank) {
    if (rank == 0) ualarm(100'000, 0);
    shm::connect({job, rank, 3}, milliseconds(600));
  });
  const Error error = expect_same_error(ends, 0);
  EXPECT_EQ(error.peer(), 0) << error.what();
}

TEST(ShmJoin, keeps_jobs_apart) {
  const std::string one = fresh_job_id();
  const std::string other = fresh_job_id();
  expect_success(fork_ranks(4, [&](int child) {
    const auto transport = shm::connect({child % 2 == 0 ? one : other, child / 2, 2}, seconds(20));
    transport->publish(0, {.sequence = 1, .words = {static_cast<std::uint64_t>(child % 2)}});
    barrier(*transport, 1);
    for (int peer = 0; peer < 2; ++peer) {
      EXPECT_EQ(transport->peek(peer, 0).words[0], static_cast<std::uint64_t>(child % 2));
    }
    barrier(*transport, 2);
  }));
}

TEST(ShmJoin, takes_ids_of_any_length) {
  const std::string id = fresh_job_id() + std::string(3000, 'x');
  expect_success(fork_ranks(2, [&](int rank) { barrier(*shm::connect({id, rank, 2}, seconds(20)), 1); }));
}

TEST(ShmJoin, a_hundred_times_under_one_id_leaves_no_file_open) {
  const std::string job = fresh_job_id();
  expect_success(fork_ranks(3, [&](int rank) {
    std::size_t before = 0;
    for (int cycle = 0; cycle < 100; ++cycle) {
      const auto transport = shm::connect({job, rank, 3}, seconds(20));
      transport->grow(100);
      barrier(*transport, 1);
      if (cycle % 2 == 0) transport->map((rank + 1) % 3, 0);
      barrier(*transport, 2);
      if (cycle == 0) before = open_files();
      if (cycle == 99) {
        EXPECT_EQ(open_files(), before);
      }
    }
    EXPECT_LT(open_files(), before);
  }));
}

// ---- those who do not belong

sockaddr_un meeting_point(const std::string& job, socklen_t& bytes) {
  const std::string text = "expar-" + std::to_string(getuid()) + "-" + job;
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path + 1, text.data(), text.size());
  bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return name;
}

TEST(ShmJoin, ignores_strangers_who_talk_nonsense) {
  const std::string job = fresh_job_id();
  expect_success(fork_ranks(3, [&](int child) {
    if (child == 2) {
      socklen_t bytes = 0;
      const sockaddr_un name = meeting_point(job, bytes);
      const shm::Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET, 0));
      const Deadline until = Clock::now() + seconds(10);
      while (connect(socket.get(), reinterpret_cast<const sockaddr*>(&name), bytes) != 0 && Clock::now() < until) {
        sleep_for(milliseconds(1));
      }
      EXPECT_GT(send(socket.get(), "hello?", 6, MSG_NOSIGNAL), 0);
      char answer = 0;
      EXPECT_LE(recv(socket.get(), &answer, 1, 0), 0) << "a hangup, without a word";
      return;
    }
    if (child == 1) sleep_for(milliseconds(100));
    barrier(*shm::connect({job, child, 2}, seconds(20)), 1);
  }));
}

TEST(ShmJoin, refuses_a_meeting_point_that_another_user_holds) {
  if (getuid() != 0) GTEST_SKIP() << "only root can be two users";
  const std::string job = fresh_job_id();
  const auto ends = fork_ranks(3, [&](int child) {
    if (child == 2) {
      socklen_t bytes = 0;
      const sockaddr_un name = meeting_point(job, bytes);
      ASSERT_EQ(setuid(65534), 0);
      const shm::Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET, 0));
      ASSERT_EQ(bind(socket.get(), reinterpret_cast<const sockaddr*>(&name), bytes), 0);
      ASSERT_EQ(listen(socket.get(), 8), 0);
      sleep_for(milliseconds(600));
      return;
    }
    sleep_for(milliseconds(150));
    shm::connect({job, child, 2}, seconds(5));
  });
  for (int rank : {0, 1}) {
    const Outcome& end = ends[static_cast<std::size_t>(rank)];
    ASSERT_TRUE(end.error.has_value()) << end.describe();
    EXPECT_EQ(end.error->code(), ErrorCode::io);
    EXPECT_NE(end.error->message().find("held by user 65534"), std::string::npos) << end.error->what();
  }
}

TEST(ShmJoin, turns_away_another_user) {
  if (getuid() != 0) GTEST_SKIP() << "only root can be two users";
  const std::string job = fresh_job_id();
  const auto ends = fork_ranks(3, [&](int child) {
    if (child == 2) {
      socklen_t bytes = 0;
      const sockaddr_un name = meeting_point(job, bytes);
      ASSERT_EQ(setuid(65534), 0);
      const shm::Fd socket(::socket(AF_UNIX, SOCK_SEQPACKET, 0));
      while (connect(socket.get(), reinterpret_cast<const sockaddr*>(&name), bytes) != 0) sleep_for(milliseconds(1));
      char answer = 0;
      EXPECT_LE(recv(socket.get(), &answer, 1, 0), 0);
      return;
    }
    if (child == 1) sleep_for(milliseconds(100));
    barrier(*shm::connect({job, child, 2}, seconds(20)), 1);
  });
  expect_success(ends);
}

TEST(ShmJoin, of_several_hosts_is_unsupported) {
  const Error error = error_of(
      [] { join(Job{.launcher = "slurm", .id = "7.0", .rank = 2, .size = 4, .local_rank = 0, .local_size = 2}); });
  EXPECT_EQ(error.code(), ErrorCode::unsupported);
}

TEST(ShmJoin, is_what_join_does) {
  const std::string id = fresh_job_id();
  expect_success(fork_ranks(2, [&](int rank) {
    const Communicator communicator =
        join(Job{.launcher = "expar", .id = id, .rank = rank, .size = 2, .local_rank = rank, .local_size = 2});
    EXPECT_EQ(communicator.transport_name(), "shm");
    EXPECT_EQ(communicator.size(), 2);
    barrier(communicator.transport(), 1);
  }));
}

}  // namespace
}  // namespace expar::test
