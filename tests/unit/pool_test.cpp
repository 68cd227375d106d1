// The pool of threads: every task once, exceptions, scratch.
#include <expar/error.h>
#include <expar/pool.h>

#include <gtest/gtest.h>

#include <atomic>
#include <ctime>
#include <stdexcept>
#include <thread>
#include <vector>

namespace expar {
namespace {

class PoolOf : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(threads, PoolOf, ::testing::Values(1, 2, 3, 8));

TEST_P(PoolOf, calls_every_task_once) {
  Pool pool(GetParam());
  EXPECT_EQ(pool.threads(), GetParam());
  for (const int tasks : {0, 1, 2, 3, 7, 100, 1000}) {
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(tasks));
    pool.run(tasks, [&](std::int64_t i, int worker) {
      EXPECT_GE(worker, 0);
      EXPECT_LT(worker, GetParam());
      calls[static_cast<std::size_t>(i)].fetch_add(1, std::memory_order_relaxed);
    });
    for (auto& c : calls) EXPECT_EQ(c.load(), 1);
  }
}

TEST_P(PoolOf, publishes_what_tasks_wrote_over_many_runs) {
  Pool pool(GetParam());
  std::vector<int> values(5, 0);  // plain ints: ThreadSanitizer sees any missing order
  for (int run = 0; run < 20000; ++run) {
    pool.run(5, [&](std::int64_t i, int) { ++values[static_cast<std::size_t>(i)]; });
    ASSERT_EQ(values[static_cast<std::size_t>(run % 5)], run + 1);
  }
}

TEST_P(PoolOf, returns_only_after_the_last_task) {
  Pool pool(GetParam());
  for (int run = 0; run < 10; ++run) {
    std::vector<int> ended(5, 0);
    pool.run(5, [&](std::int64_t i, int) {
      // Long enough that every worker gets a task, uneven so that another one than the caller ends last.
      std::this_thread::sleep_for(std::chrono::microseconds(300 + 200 * i));
      ended[static_cast<std::size_t>(i)] = 1;
    });
    EXPECT_EQ(ended, std::vector<int>(5, 1));
  }
}

TEST_P(PoolOf, wakes_workers_that_fell_asleep) {
  Pool pool(GetParam());
  for (int run = 0; run < 5; ++run) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    std::atomic<int> calls = 0;
    pool.run(10, [&](std::int64_t, int) { ++calls; });
    EXPECT_EQ(calls, 10);
  }
}

TEST_P(PoolOf, rethrows_an_exception_after_all_tasks_ended) {
  Pool pool(GetParam());
  for (int run = 0; run < 50; ++run) {
    std::atomic<int> calls = 0;
    EXPECT_THROW(pool.run(20,
                          [&](std::int64_t i, int) {
                            ++calls;
                            if (i % 7 == 3) throw std::runtime_error("task");
                          }),
                 std::runtime_error);
    EXPECT_EQ(calls, 20);
    pool.run(20, [&](std::int64_t, int) { ++calls; });
    EXPECT_EQ(calls, 40);
  }
}

TEST_P(PoolOf, gives_each_worker_scratch_of_its_own) {
  Pool pool(GetParam());
  pool.run(200, [&](std::int64_t i, int worker) {
    const auto bytes = static_cast<std::size_t>(1 + i * 100);
    std::byte* mine = pool.scratch(worker, bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(mine) % 64, 0u);
    for (std::size_t k = 0; k < bytes; ++k) mine[k] = static_cast<std::byte>(worker);
    for (std::size_t k = 0; k < bytes; ++k) ASSERT_EQ(mine[k], static_cast<std::byte>(worker));
  });
}

TEST(Pool, keeps_scratch_that_is_large_enough) {
  Pool pool(1);
  std::byte* first = pool.scratch(0, 100000);
  EXPECT_EQ(pool.scratch(0, 10), first);
  EXPECT_EQ(pool.scratch(0, 100000), first);
  EXPECT_NE(pool.scratch(0, 0), nullptr);
}

TEST(Pool, uses_no_processor_time_while_idle) {
  Pool pool(2);  // more threads than cores would not even spin briefly
  pool.run(2, [](std::int64_t, int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(5));  // let the brief spin end
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const double used = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
  EXPECT_LT(used, 0.03);
}

TEST(Pool, refuses_to_have_no_thread) {
  try {
    Pool pool(0);
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::bad_argument);
  }
}

}  // namespace
}  // namespace expar
