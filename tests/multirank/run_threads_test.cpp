// Ranks as threads of the test itself.
#include <expar/collectives.h>
#include <expar/registry.h>
#include <gtest/gtest.h>

#include <atomic>
#include <new>
#include <stdexcept>
#include <thread>

#include "tests/error_of.h"

namespace expar {
namespace {

Error error_of_run(int ranks, const std::function<void(Communicator)>& rank_main) {
  return test::error_of([&] { run_threads(ranks, rank_main, {.timeout = std::chrono::seconds(20)}); });
}

void wait_for_rank(const Communicator& communicator, int peer) {
  communicator.wait([] { return false; },
                    {.peer = peer, .operation = "test", .what = "its rows", .limit = std::chrono::seconds(20)});
}

TEST(RunThreads, runs_every_rank_once) {
  for (int ranks : {1, 2, 3, 8}) {
    std::vector<std::atomic<int>> ran(static_cast<std::size_t>(ranks));
    run_threads(ranks, [&](Communicator communicator) {
      EXPECT_EQ(communicator.size(), ranks);
      EXPECT_EQ(communicator.transport_name(), "threads");
      ran[static_cast<std::size_t>(communicator.rank())].fetch_add(1);
    });
    for (const auto& count : ran) EXPECT_EQ(count.load(), 1);
  }
}

TEST(RunThreads, refuses_no_ranks) {
  EXPECT_EQ(error_of_run(0, [](Communicator) {}).code(), ErrorCode::bad_argument);
}

TEST(RunThreads, throws_what_a_rank_threw) {
  const Error error = error_of_run(3, [](Communicator communicator) {
    if (communicator.rank() == 1) throw std::runtime_error("no bananas");
    wait_for_rank(communicator, 1);
  });
  EXPECT_EQ(error.code(), ErrorCode::internal);
  EXPECT_EQ(error.rank(), 1);
  EXPECT_EQ(error.message(), "no bananas");
}

TEST(RunThreads, keeps_the_code_of_an_error) {
  const Error error = error_of_run(2, [](Communicator communicator) {
    if (communicator.rank() == 0) throw Error(ErrorCode::io, "no such text", {0, -1, "read"});
    wait_for_rank(communicator, 0);
  });
  EXPECT_EQ(error.code(), ErrorCode::io);
  EXPECT_STREQ(error.what(), Error(ErrorCode::io, "no such text", {0, -1, "read"}).what());
}

TEST(RunThreads, says_that_memory_ran_out_and_where) {
  const Error error = error_of_run(2, [](Communicator communicator) {
    if (communicator.rank() == 1) throw std::bad_alloc();
    wait_for_rank(communicator, 1);
  });
  EXPECT_EQ(error.code(), ErrorCode::no_memory);
  EXPECT_EQ(error.rank(), 1);
  EXPECT_EQ(error.message(), "memory ran out");
}

TEST(RunThreads, throws_something_even_for_something_that_is_no_exception) {
  const Error error = error_of_run(2, [](Communicator communicator) {
    if (communicator.rank() == 1) throw 42;
    wait_for_rank(communicator, 1);
  });
  EXPECT_EQ(error.code(), ErrorCode::internal);
  EXPECT_EQ(error.rank(), 1);
}

}  // namespace
}  // namespace expar
