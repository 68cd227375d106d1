// How every transport ends: late ranks, ranks that leave or give up; one error, the same on every rank.
#include <expar/transport.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <string>
#include <thread>

#include "tests/contract/transport_suite.h"

namespace expar::test {
namespace {

using std::chrono::milliseconds;

/// Far more than any of this takes, far less than the limits of the waits: the machine may be busy with other things.
constexpr auto kGenerous = milliseconds(1500);

class Failures : public TransportSuite {};

TEST_P(Failures, a_late_rank_is_named_on_every_rank) {
  const RankSetup setup = GetParam();
  const int late = setup.ranks - 1;
  const auto ends = run_transports(setup, [late](Transport& transport) {
    if (transport.rank() == late) {
      // The late rank does not look for the others before they have given up.
      const Deadline until = Clock::now() + milliseconds(300);
      while (Clock::now() < until && !transport.failure()) std::this_thread::sleep_for(milliseconds(1));
    }
    if (transport.rank() != late || transport.size() == 1) {
      transport.wait([&] { return transport.peek(late, 0).sequence == 1; },
                     {.peer = late, .operation = "dispatch", .what = "to start", .limit = milliseconds(100)});
    }
    transport.wait([] { return false; }, for_test(-1));
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::timeout);
  EXPECT_EQ(error.peer(), late);
  EXPECT_EQ(error.operation(), "dispatch");
  const std::string expected = "rank " + std::to_string(late) + " is late: rank " + std::to_string(error.rank()) +
                               " has waited 0.1 s for it to start dispatch";
  EXPECT_EQ(error.message(), expected);
}

TEST_P(Failures, a_limit_is_kept) {
  const auto ends = run_transports(GetParam(), [](Transport& transport) {
    const Deadline start = Clock::now();
    EXPECT_THROW(transport.wait([] { return false; }, for_test(-1, milliseconds(60))), Error);
    EXPECT_LT(Clock::now() - start, kGenerous);
    // Somebody else's limit may have ended first, but none before its time.
    ASSERT_TRUE(transport.failure().has_value());
    if (transport.failure()->rank() == transport.rank()) {
      EXPECT_GE(Clock::now() - start, milliseconds(60));
    }
  });
  expect_success(ends);
}

TEST_P(Failures, abort_reaches_every_rank_with_the_same_words) {
  const auto ends = run_transports(GetParam(), [](Transport& transport) {
    if (transport.rank() == transport.size() - 1) {
      std::this_thread::sleep_for(milliseconds(20));
      const Error mine(ErrorCode::bad_argument, "ids[17,2] = 64 is not below num_experts 64",
                       {transport.rank(), -1, "dispatch"});
      const Error cause = transport.abort(mine);
      EXPECT_STREQ(cause.what(), mine.what());
      throw cause;
    }
    transport.wait([] { return false; }, for_test(-1));
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::bad_argument);
  EXPECT_EQ(error.rank(), GetParam().ranks - 1);
  EXPECT_EQ(error.message(), "ids[17,2] = 64 is not below num_experts 64");
}

TEST_P(Failures, the_first_of_many_causes_stays) {
  const auto ends = run_transports(GetParam(), [](Transport& transport) {
    barrier(transport, 1);
    const Error mine(ErrorCode::internal, "rank " + std::to_string(transport.rank()) + " was first",
                     {transport.rank(), -1, {}});
    const Error first = transport.abort(mine);
    const Error second = transport.abort(Error(ErrorCode::io, "too late", {transport.rank(), -1, {}}));
    EXPECT_STREQ(first.what(), second.what());
    throw second;
  });
  EXPECT_EQ(expect_same_error(ends).code(), ErrorCode::internal);
}

TEST_P(Failures, after_a_cause_everything_throws_it_at_once) {
  const auto ends = run_transports(GetParam(), [](Transport& transport) {
    const Error cause = transport.abort(Error(ErrorCode::timeout, "too slow", {0, 1, "test"}));
    const Deadline start = Clock::now();
    EXPECT_STREQ(error_of([&] { transport.wait([] { return false; }, for_test(-1)); }).what(), cause.what());
    EXPECT_STREQ(error_of([&] { transport.grow(100); }).what(), cause.what());
    EXPECT_STREQ(error_of([&] { transport.map(transport.size() - 1, 3); }).what(), cause.what());
    EXPECT_STREQ(error_of([&] { transport.start({}); }).what(), cause.what());
    EXPECT_LT(Clock::now() - start, kGenerous);
  });
  expect_success(ends);
}

TEST_P(Failures, a_rank_that_has_left_fails_only_those_who_wait_for_it) {
  if (GetParam().ranks < 3) return;
  const auto ends = run_transports(GetParam(), [](Transport& transport) {
    barrier(transport, 1);
    if (transport.rank() == 1) {
      transport.publish(0, {.sequence = 1});
      return;
    }
    // What rank 1 did before it left counts, and others may go on without it.
    std::this_thread::sleep_for(milliseconds(40));
    transport.wait([&] { return transport.peek(1, 0).sequence == 1; }, for_test(1));
    transport.publish(1, {.sequence = 1});
    const int other = transport.rank() == 0 ? 2 : 0;
    transport.wait([&] { return transport.peek(other, 1).sequence == 1; }, for_test(other));
    const Deadline until = Clock::now() + milliseconds(30);
    transport.wait([&] { return Clock::now() > until; }, for_test(other));
    transport.publish(2, {.sequence = 1});
    for (int peer = 0; peer < transport.size(); ++peer) {
      if (peer != 1) transport.wait([&] { return transport.peek(peer, 2).sequence == 1; }, for_test(peer));
    }
  });
  expect_success(ends);
}

TEST_P(Failures, waiting_for_a_rank_that_has_left_is_peer_lost_soon) {
  if (GetParam().ranks < 2) return;
  Shared<std::atomic<std::int64_t>> left;
  const auto ends = run_transports(GetParam(), [&left](Transport& transport) {
    barrier(transport, 1);
    if (transport.rank() == 1) {
      std::this_thread::sleep_for(milliseconds(30));
      left->store(Clock::now().time_since_epoch().count());
      return;
    }
    const Error error = error_of([&] {
      transport.wait([&] { return transport.peek(1, 0).sequence == 1; },
                     {.peer = 1, .operation = "combine", .what = "its rows", .limit = std::chrono::seconds(20)});
    });
    EXPECT_LT(Clock::now().time_since_epoch() - Clock::duration(left->load()), kGenerous);
    throw error;
  });
  const Error error = expect_same_error(ends, 1);
  EXPECT_TRUE(ends[1].ok()) << ends[1].describe();
  EXPECT_EQ(error.code(), ErrorCode::peer_lost);
  EXPECT_EQ(error.peer(), 1);
  EXPECT_EQ(error.message(),
            "rank 1 has left; rank " + std::to_string(error.rank()) + " still waited for its rows (combine)");
}

TEST_P(Failures, nothing_moves_after_the_cause) {
  if (GetParam().ranks < 2) return;
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    const int last = transport.size() - 1;
    std::array<std::byte, 100> data{};
    const Message received{Message::Kind::receive, last, 9, data.data(), data.size()};
    if (transport.rank() == last) {
      transport.wait([&] { return transport.peek(0, 0).sequence == 1; }, for_test(0));
      data.fill(std::byte{1});
      transport.start(std::array{Message{Message::Kind::send, 0, 9, data.data(), data.size()}});
      transport.abort(Error(ErrorCode::internal, "stop", {last}));
    } else if (transport.rank() == 0) {
      const Transport::Ticket ticket = transport.start(std::array{received});
      transport.publish(0, {.sequence = 1});
      while (!transport.failure()) std::this_thread::sleep_for(milliseconds(1));
      // All of it has come, but whoever failed may have let go of this memory.
      EXPECT_EQ(error_of([&] { transport.test(ticket); }).message(), "stop");
      EXPECT_EQ(error_of([&] { transport.wait([&] { return transport.test(ticket); }, for_test(last)); }).message(),
                "stop");
      EXPECT_EQ(std::count(data.begin(), data.end(), std::byte{0}), 100);
    }
  }));
}

TEST_P(Failures, a_rank_that_is_interrupted_ends_the_job) {
  const auto ends = run_transports(GetParam(), [](Transport& transport) {
    const int last = transport.size() - 1;
    int questions = 0;
    Deadline previous = Clock::now();
    if (transport.rank() == last) {
      transport.interrupt_by([&] {
        EXPECT_LT(Clock::now() - previous, kGenerous);
        previous = Clock::now();
        return ++questions == 2;
      });
    }
    const Error error = error_of([&] { transport.wait([] { return false; }, for_test(-1)); });
    EXPECT_EQ(questions, transport.rank() == last ? 2 : 0);
    throw error;
  });
  const Error error = expect_same_error(ends);
  const int last = GetParam().ranks - 1;
  EXPECT_EQ(error.code(), ErrorCode::internal);
  EXPECT_EQ(error.rank(), last);
  EXPECT_EQ(error.what(), "rank " + std::to_string(last) + ": test: was interrupted");
}

TEST_P(Failures, a_rank_that_is_no_longer_asked_waits_on) {
  expect_success(run_transports(GetParam(), [](Transport& transport) {
    bool interrupted = false;
    transport.interrupt_by([&] { return interrupted; });
    const auto wait_awhile = [&] {
      const Deadline until = Clock::now() + milliseconds(30);
      transport.wait([&] { return Clock::now() >= until; }, for_test(-1));
    };
    wait_awhile();
    interrupted = true;
    transport.interrupt_by({});
    wait_awhile();
    barrier(transport, 1);
  }));
}

INSTANTIATE_TEST_SUITE_P(Transports, Failures, ::testing::ValuesIn(contract_setups()), setup_name);

}  // namespace
}  // namespace expar::test
