// Processes that die, stop or vanish while others wait for them: who is named, how soon, and what is left behind.
#include <expar/transport.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <filesystem>
#include <set>
#include <string>
#include <thread>

#include "tests/contract/transport_suite.h"

namespace expar::test {
namespace {

using std::chrono::milliseconds;

/// "Noticed within 50 ms of the death or of the survivor's next wait, whichever is later."
constexpr auto kNotice = milliseconds(50);
/// On a machine that is busy with other things a rank may wait longer than that for its core. So the limit is measured
/// in one test, at best of a few tries; elsewhere it only has to be far below the limit of the wait.
constexpr int kTries = 4;
constexpr auto kSoon = milliseconds(1500);

std::int64_t now() { return Clock::now().time_since_epoch().count(); }

std::set<std::string> names_in_dev_shm() {
  std::set<std::string> names;
  if (!std::filesystem::exists("/dev/shm")) return names;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) names.insert(entry.path().filename());
  return names;
}

// How much too long the longest of some short sleeps takes.
Clock::duration oversleep() {
  Clock::duration longest{};
  for (int i = 0; i < 50; ++i) {
    const Deadline start = Clock::now();
    std::this_thread::sleep_for(milliseconds(1));
    longest = std::max(longest, Clock::now() - start - milliseconds(1));
  }
  return longest;
}

struct Death {
  std::atomic<std::int64_t> time;
  std::atomic<std::int64_t> latest_notice;
  std::atomic<pid_t> pid;
};

// What the survivors of `victim`'s death do: wait for `awaited`, and say when they noticed.
void survive(Transport& transport, Shared<Death>& death, int awaited) {
  const Error error = error_of([&] {
    transport.wait([] { return false; },
                   {.peer = awaited, .operation = "dispatch", .what = "to start", .limit = std::chrono::seconds(20)});
  });
  const std::int64_t noticed = now() - death->time.load();
  std::int64_t latest = death->latest_notice.load();
  while (noticed > latest && !death->latest_notice.compare_exchange_weak(latest, noticed)) {
  }
  throw error;
}

class ShmDeath : public TransportSuite {};

std::vector<RankSetup> setups() {
  std::vector<RankSetup> result;
  for (int ranks : {2, 3, 4, 8}) {
    for (bool mapping : {true, false}) result.push_back({.kind = Kind::shm, .ranks = ranks, .mapping = mapping});
  }
  return result;
}

// Kills `victim`; returns how long it took until the last survivor had noticed.
Clock::duration time_to_notice(const RankSetup& setup, int victim) {
  Shared<Death> death;
  const auto ends = run_transports(setup, [&](Transport& transport) {
    transport.grow(1 << 20);
    barrier(transport, 1);
    if (transport.rank() == victim) {
      std::this_thread::sleep_for(milliseconds(20));
      death->pid.store(getpid());
      death->time.store(now());
      raise(SIGKILL);
    }
    survive(transport, death, victim);
  });
  const Error error = expect_same_error(ends, victim);
  EXPECT_EQ(ends[static_cast<std::size_t>(victim)].signal, SIGKILL);
  EXPECT_EQ(error.code(), ErrorCode::peer_lost);
  EXPECT_EQ(error.peer(), victim);
  EXPECT_EQ(error.message(), "rank " + std::to_string(victim) + " died (process " + std::to_string(death->pid.load()) +
                                 ") while rank " + std::to_string(error.rank()) + " waited for it to start dispatch");
  return Clock::duration(death->latest_notice.load());
}

TEST_P(ShmDeath, is_noticed_by_every_survivor_within_50_ms_and_leaves_nothing_behind) {
  const auto before = names_in_dev_shm();
  for (int victim = 0; victim < GetParam().ranks; victim += GetParam().ranks - 1) {
    Clock::duration best = Clock::duration::max();
    for (int i = 0; i < kTries && best >= kNotice; ++i) best = std::min(best, time_to_notice(GetParam(), victim));
    if (best >= kNotice && oversleep() > kNotice / 5) {
      GTEST_SKIP() << "this machine is too busy to tell: a sleep of 1 ms takes " << oversleep().count() / 1000 << " us";
    }
    EXPECT_LT(best, kNotice);
    RecordProperty("noticed_us", static_cast<int>(best.count() / 1000));
  }
  EXPECT_EQ(names_in_dev_shm(), before);
}

TEST_P(ShmDeath, of_one_rank_is_noticed_by_those_who_wait_for_another) {
  if (GetParam().ranks < 3) return;
  Shared<Death> death;
  const auto ends = run_transports(GetParam(), [&](Transport& transport) {
    barrier(transport, 1);
    if (transport.rank() == 2) {
      death->time.store(now());
      raise(SIGKILL);
    }
    survive(transport, death, 1 - std::min(transport.rank(), 1));
  });
  const Error error = expect_same_error(ends, 2);
  EXPECT_EQ(error.peer(), 2);
  EXPECT_LT(Clock::duration(death->latest_notice.load()), kSoon);
}

TEST_P(ShmDeath, while_others_compute_is_noticed_at_their_next_wait) {
  Shared<Death> death;
  const auto ends = run_transports(GetParam(), [&](Transport& transport) {
    barrier(transport, 1);
    if (transport.rank() == 1) raise(SIGKILL);
    std::this_thread::sleep_for(milliseconds(100));
    std::int64_t start = now();
    std::int64_t earlier = 0;
    if (!death->time.compare_exchange_strong(earlier, start)) start = earlier;
    survive(transport, death, 1);
  });
  EXPECT_EQ(expect_same_error(ends, 1).peer(), 1);
  EXPECT_LT(Clock::duration(death->latest_notice.load()), kSoon);
}

TEST_P(ShmDeath, by_exit_is_a_death_too) {
  const auto ends = run_transports(GetParam(), [&](Transport& transport) {
    barrier(transport, 1);
    if (transport.rank() == 0) _exit(3);
    barrier(transport, 2);
  });
  const Error error = expect_same_error(ends, 0);
  EXPECT_EQ(error.code(), ErrorCode::peer_lost);
  EXPECT_EQ(error.peer(), 0);
}

TEST_P(ShmDeath, never_hides_the_cause_that_the_dead_rank_gave_before) {
  const auto ends = run_transports(GetParam(), [&](Transport& transport) {
    barrier(transport, 1);
    if (transport.rank() == 1) {
      transport.abort(Error(ErrorCode::io, "the disk is full", {1, -1, "save"}));
      raise(SIGKILL);
    }
    std::this_thread::sleep_for(milliseconds(30));
    barrier(transport, 2);
  });
  const Error error = expect_same_error(ends, 1);
  EXPECT_EQ(error.code(), ErrorCode::io);
  EXPECT_EQ(error.message(), "the disk is full");
}

TEST_P(ShmDeath, is_noticed_although_a_child_of_the_dead_rank_lives_on) {
  Shared<Death> death;
  const auto ends = run_transports(GetParam(), [&](Transport& transport) {
    barrier(transport, 1);
    if (transport.rank() == 1) {
      if (fork() == 0) {  // holds copies of all sockets
        usleep(300'000);
        _exit(0);
      }
      death->time.store(now());
      raise(SIGKILL);
    }
    survive(transport, death, 1);
  });
  EXPECT_EQ(expect_same_error(ends, 1).peer(), 1);
  EXPECT_LT(Clock::duration(death->latest_notice.load()), kSoon);
}

TEST_P(ShmDeath, does_not_take_what_the_rank_had_finished) {
  expect_no_failures(run_transports(GetParam(), [&](Transport& transport) {
    if (transport.rank() == 1) {
      transport.publish(0, {.sequence = 1, .words = {42}});
      raise(SIGKILL);
    }
    std::this_thread::sleep_for(milliseconds(30));
    transport.wait([&] { return transport.peek(1, 0).sequence == 1; }, for_test(1));
    EXPECT_EQ(transport.peek(1, 0).words[0], 42U);
  }));
}

TEST_P(ShmDeath, a_stopped_rank_is_late_and_wakes_up_to_the_same_error) {
  Shared<Death> death;
  const auto ends = run_transports(GetParam(), [&](Transport& transport) {
    if (transport.rank() == 1) death->pid.store(getpid());
    barrier(transport, 1);
    if (transport.rank() == 1) raise(SIGSTOP);
    if (transport.rank() == 0) {
      const Error error = error_of([&] { barrier(transport, 2, milliseconds(80)); });
      kill(death->pid.load(), SIGCONT);
      throw error;
    }
    barrier(transport, 2);
    transport.wait([] { return false; }, for_test(-1));
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::timeout);
  EXPECT_EQ(error.peer(), 1);
  EXPECT_EQ(error.message(), "rank 1 is late: rank 0 has waited 0.08 s for it to start barrier");
}

INSTANTIATE_TEST_SUITE_P(Processes, ShmDeath, ::testing::ValuesIn(setups()), setup_name);

}  // namespace
}  // namespace expar::test
