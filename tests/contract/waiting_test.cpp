// Waiting: for ranks that are late, of which every other one is told by name, and asleep. failure_test has late ranks
// on every transport; what stands on it, which takes its time, is tried on a few.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <ctime>
#include <thread>

#include <expar/collectives.h>
#include <expar/dispatch.h>

#include "tests/contract/transport_suite.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

class Sleeper : public TransportSuite {};

TEST_P(Sleeper, is_woken_and_takes_no_processor_time) {
  struct Seen {
    std::atomic<int> waiting{0};
    std::atomic<std::int64_t> published{0};
  };
  Shared<Seen> seen;
  expect_success(run_transports(GetParam(), [&](Transport& transport) {
    Clock::duration best = Clock::duration::max();
    timespec before{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
    constexpr int kRounds = 8;
    for (int round = 1; round <= kRounds; ++round) {
      if (transport.rank() == 0) {
        while (seen->waiting < round * (transport.size() - 1)) std::this_thread::sleep_for(microseconds(100));
        // Early in the third slice of sleep, which takes 10 ms: whom nobody wakes sleeps to the end of it.
        std::this_thread::sleep_for(microseconds(21500));
        seen->published.store(Clock::now().time_since_epoch().count());
      } else {
        ++seen->waiting;
      }
      barrier(transport, static_cast<std::uint64_t>(round));
      best = std::min(best, Clock::now().time_since_epoch() - Clock::duration(seen->published.load()));
    }
    timespec after{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
    const double used = double(after.tv_sec - before.tv_sec) + 1e-9 * double(after.tv_nsec - before.tv_nsec);
    barrier(transport, kRounds + 1);  // whoever leaves rings too
    EXPECT_LT(best, milliseconds(5)) << "nobody rang";
    EXPECT_LT(used, 0.5 * 0.0215 * kRounds) << "seconds of processor time";
  }));
}

INSTANTIATE_TEST_SUITE_P(Transports, Sleeper, testing::ValuesIn(all_setups({2, 8})), setup_name);

class LateRank : public testing::TestWithParam<Way> {};

/// Does nothing until another rank has given up waiting.
void be_late(const Context& context) {
  const Deadline until = Clock::now() + std::chrono::seconds(20);
  while (!context.communicator().transport().failure() && Clock::now() < until)
    std::this_thread::sleep_for(milliseconds(1));
}

TEST_P(LateRank, is_named_on_every_rank) {
  const auto ends = run_all(GetParam(), [](const Context& context) {
    barrier(context);
    if (context.rank() == 1) be_late(context);
    barrier(context.with_timeout(milliseconds(300)));
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::timeout) << error.what();
  EXPECT_EQ(error.peer(), 1) << error.what();
  EXPECT_EQ(error.operation(), "barrier");
}

TEST_P(LateRank, is_named_with_all_others_that_are_late) {
  const auto ends = run_all(GetParam(), [](const Context& context) {
    barrier(context);
    if (context.rank() != 0) be_late(context);
    barrier(context.with_timeout(milliseconds(200)));
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::timeout) << error.what();
  EXPECT_EQ(error.peer(), 1);
  const int ranks = GetParam().ranks;
  const std::string names = ranks == 3   ? "ranks 1 and 2"
                            : ranks == 4 ? "ranks 1, 2 and 3"
                                         : "ranks 1, 2, 3, 4 and " + std::to_string(ranks - 5) + " more";
  EXPECT_EQ(error.message(), names + " are late: rank 0 has waited 0.2 s for them to start barrier");
}

TEST_P(LateRank, ends_the_communicator_for_good) {
  run_all(GetParam(), [](const Context& context) {
    if (context.rank() == 1) be_late(context);
    const Error first = error_of([&] { barrier(context.with_timeout(milliseconds(100))); });
    const auto begin = Clock::now();
    const Error second = error_of([&] { barrier(context); });
    EXPECT_EQ(std::string(first.what()), second.what());
    EXPECT_LT(Clock::now() - begin, std::chrono::seconds(5)) << "it waited again, for up to 30 s";
  });
}

TEST_P(LateRank, is_named_by_a_bounded_dispatch) {
  const auto ends = run_all(GetParam(), [](const Context& context) {
    const std::vector<std::int32_t> ids(3, 1);
    const Plan plan = make_bounded_plan(context, ConstTensor(ids.data(), Shape{3, 1}), 3, {.experts = 4});
    const Array x(DType::f32, Shape{3, 4});
    barrier(context);
    if (context.rank() == 1) be_late(context);
    dispatch(context.with_timeout(milliseconds(300)), x, {}, plan);
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::timeout) << error.what();
  EXPECT_EQ(error.peer(), 1) << error.what();
}

TEST_P(LateRank, of_a_group_is_named_as_the_job_does) {
  const auto ends = run_all(GetParam(), [](const Context& context) {
    const Context group = context.on(context.communicator().split(context.rank() == 0 ? 0 : 1));
    barrier(context);
    if (context.rank() == 2) be_late(context);
    barrier(group.with_timeout(milliseconds(300)));
    barrier(context);
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::timeout) << error.what();
  EXPECT_EQ(error.peer(), 2) << error.what();
  EXPECT_NE(error.message().find("rank 2 is late"), std::string::npos) << error.what();
}

TEST_P(LateRank, is_no_reason_to_wait_for_who_is_interrupted) {
  const auto ends = run_all(GetParam(), [](const Context& context) {
    barrier(context);
    if (context.rank() == 1) be_late(context);
    if (context.rank() == 0) context.communicator().interrupt_by([] { return true; });
    barrier(context);
  });
  const Error error = expect_same_error(ends);
  EXPECT_STREQ(error.what(), "rank 0: barrier: was interrupted");
}

INSTANTIATE_TEST_SUITE_P(Ways, LateRank,
                         testing::Values(Way{.ranks = 4}, Way{.kind = Kind::shm, .ranks = 3, .mapping = false},
                                         Way{.ranks = 3, .group = true}),
                         way_name);

}  // namespace
}  // namespace expar::test
