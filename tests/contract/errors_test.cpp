// Errors of one rank reach all ranks as the same error, and those found before bytes move do no harm.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <thread>

#include <expar/collectives.h>
#include <expar/dispatch.h>

#include "tests/contract/routes.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

class Errors : public EveryWay {};

TEST_P(Errors, tells_all_ranks_which_rank_has_a_bad_id_and_goes_on) {
  run(GetParam(), [](const Context& context) {
    const int bad = context.size() - 1;
    for (const std::int32_t wrong : {64, -2}) {
      std::vector<std::int32_t> ids(40, 1);
      if (context.rank() == bad) ids[35] = wrong;
      const ConstTensor tensor(ids.data(), Shape{20, 2});
      const Error error = error_of([&] { make_plan(context, tensor, {.experts = 64}); });
      require(error.code() == ErrorCode::bad_argument, error.what());
      require_equal(error.rank(), bad, "rank of the error");
      const std::string text = wrong < 0 ? "ids[17,1] = -2 is below -1" : "ids[17,1] = 64 is not below num_experts 64";
      require(error.message() == text, "message: " + error.message());
      barrier(context);
    }
  });
}

TEST_P(Errors, tells_all_ranks_that_first_experts_are_no_ranges) {
  run(GetParam(), [](const Context& context) {
    const int bad = context.size() - 1;
    const std::vector<std::int32_t> ids(8, 1);
    const auto ranks = static_cast<std::size_t>(context.size());
    std::vector<std::int64_t> right(ranks + 1, 4);
    right.front() = 0;
    std::vector<std::int64_t> late = right, short_ = right, falling = right;
    late.front() = 1;
    short_.pop_back();
    falling.back() = 3;
    for (const auto& wrong : {late, short_, falling}) {
      const Error error = error_of([&] {
        make_plan(context, ConstTensor(ids.data(), Shape{4, 2}),
                  {.experts = 4, .first_experts = context.rank() == bad ? wrong : right});
      });
      require(error.code() == ErrorCode::bad_argument, error.what());
      require_equal(error.rank(), bad, "rank of the error");
      require(error.message().find(" numbers that ascend from 0 to 4") != std::string::npos, error.message());
      barrier(context);
    }
  });
}

TEST_P(Errors, tells_all_ranks_who_disagrees) {
  if (GetParam().ranks == 1) return;  // nobody to disagree with
  run(GetParam(), [](const Context& context) {
    const int odd = context.size() / 2;
    const bool mine = context.rank() == odd;
    const auto check = [&](const Error& error, const std::string& part) {
      require(error.code() == ErrorCode::mismatch, error.what());
      require_equal(error.rank(), odd, "rank of the error");
      require(error.message().find(part) != std::string::npos, "message: " + error.message());
      barrier(context);  // still usable
    };
    // Another operation.
    std::vector<float> data(8);
    check(error_of([&] { mine ? broadcast(context, Tensor(data.data(), Shape{8}), 0) : barrier(context); }),
          "runs broadcast");
    // Another shape.
    check(error_of([&] { broadcast(context, Tensor(data.data(), Shape{mine ? 4 : 8}), 0); }), "bytes 16");
    // Another dtype, hidden size, K.
    std::vector<std::int32_t> ids(8, 0);
    check(error_of([&] {
            make_plan(context, ConstTensor(ids.data(), mine ? Shape{2, 4} : Shape{4, 2}), {.experts = 4});
          }),
          "topk 4");
    std::vector<std::int64_t> first(static_cast<std::size_t>(context.size()) + 1, 4);
    first.front() = 0;
    if (mine) first[1] = 0;
    check(error_of([&] {
            make_plan(context, ConstTensor(ids.data(), Shape{4, 2}), {.experts = 4, .first_experts = first});
          }),
          "first_experts");
    const Plan plan = make_plan(context, ConstTensor(ids.data(), Shape{4, 2}), {.experts = 4});
    const Array wide(DType::f32, Shape{4, 16}), narrow(DType::f32, Shape{4, 8}), low(DType::bf16, Shape{4, 16});
    check(error_of([&] { dispatch(context, mine ? narrow : wide, {}, plan); }), "hidden 8");
    check(error_of([&] { dispatch(context, mine ? low : wide, {}, plan); }), "dtype");
  });
}

TEST_P(Errors, carries_a_users_own_message_to_every_rank) {
  const auto ends = run_all(GetParam(), [](const Context& context) {
    barrier(context);
    if (context.rank() == context.size() - 1) context.communicator().abort("the file of weights is gone");
    barrier(context);
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::internal);
  EXPECT_EQ(error.rank(), GetParam().ranks - 1);
  EXPECT_EQ(error.message(), "the file of weights is gone");
}

TEST_P(Errors, does_not_hide_an_exception_behind_the_operation_it_left_open) {
  const auto ends = run_all(GetParam(), [](const Context& context) {
    std::vector<std::int32_t> ids(8, 0);
    const Plan plan = make_plan(context, ConstTensor(ids.data(), Shape{4, 2}), {.experts = 4});
    const Array x(DType::f32, Shape{4, 16});
    auto pending = start_dispatch(context, x, {}, plan);
    if (context.rank() == 0) throw std::runtime_error("no such expert");
    pending.finish();
    barrier(context);
  });
  EXPECT_EQ(expect_same_error(ends).message(), "no such expert");
}

TEST_P(Errors, keeps_the_inbox_of_a_dispatch_that_an_exception_unwound_for_those_who_still_write_to_it) {
  constexpr std::int64_t kWidth = 1000;
  run(GetParam(), [](const Context& context) {
    // Rank 0 gives nothing, so that the others need nothing more from it. Messages it would have to take.
    const bool gives = context.rank() != 0 && context.communicator().mapped(0);
    const std::int64_t tokens = gives ? 4 : 0;
    const std::vector<std::int32_t> ids(4, 0);
    const Plan plan = make_plan(context, ConstTensor(ids.data(), Shape{tokens, 1}), {.experts = context.size()});
    const std::vector<float> rows(4 * kWidth, 1.0F);
    const ConstTensor x(rows.data(), Shape{tokens, kWidth});
    Block next;
    if (context.rank() == 0) {
      try {
        const PendingDispatch pending = start_dispatch(context, x, {}, plan);
        throw std::runtime_error("the user's own");
      } catch (const std::runtime_error&) {
      }
      next = context.communicator().allocate(static_cast<std::size_t>(plan.unique()) * kWidth * sizeof(float));
      std::memset(next.data(), 0, next.size());
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      dispatch(context, x, {}, plan);
    }
    barrier(context);
    const auto written = [](std::byte b) { return b != std::byte{0}; };
    require(std::none_of(next.data(), next.data() + next.size(), written), "a row came where the inbox had been");
  });
}

TEST_P(Errors, still_sends_the_rows_of_a_dispatch_that_an_exception_unwound) {
  constexpr std::int64_t kTokens = 8, kWidth = 100'000;  // more than is under way at a time
  run(GetParam(), [](const Context& context) {
    const Communicator& communicator = context.communicator();
    const int last = context.size() - 1;
    const std::int64_t tokens = context.rank() == 0 ? kTokens : 0;
    const std::vector<std::int32_t> ids(kTokens, last);
    const Plan plan = make_plan(context, ConstTensor(ids.data(), Shape{tokens, 1}), {.experts = context.size()});
    const std::vector<float> rows(kTokens * kWidth, 1.0F);
    const ConstTensor x(rows.data(), Shape{tokens, kWidth});
    std::optional<PendingDispatch> pending = start_dispatch(context, x, {}, plan);
    barrier(context);  // now all have started it
    Block other;
    if (context.rank() == 0) {
      try {
        const PendingDispatch unwound = std::move(*pending);
        int turns = 0;  // in which the rows are posted
        communicator.wait([&] { return ++turns > 3; },
                          {.operation = "dispatch", .what = "a few turns", .limit = communicator.timeout()});
        throw std::runtime_error("the user's own");
      } catch (const std::runtime_error&) {
      }
      other = communicator.allocate(kTokens * kWidth * sizeof(float));
      std::memset(other.data(), 0xff, other.size());
    } else {
      const Inbox inbox = pending->finish();
      const float* row = inbox.rows().as<float>();
      const bool whole = std::all_of(row, row + inbox.rows().elements(), [](float value) { return value == 1; });
      require(context.rank() != last || (whole && inbox.rows().size(0) == kTokens),
              "rows that came were not those sent");
    }
    barrier(context);
  });
}

TEST_P(Errors, ends_the_job_when_an_operation_is_dropped_half_way) {
  if (GetParam().ranks == 1) return;
  const auto ends = run_all(GetParam(), [](const Context& context) {
    std::vector<std::int32_t> ids(8, 0);
    const Plan plan = make_plan(context, ConstTensor(ids.data(), Shape{4, 2}), {.experts = 4});
    const Array x(DType::f32, Shape{4, 16});
    auto pending = start_dispatch(context, x, {}, plan);
    if (context.rank() == 0) {
      const PendingDispatch dropped = std::move(pending);
      return;
    }
    pending.finish();
    barrier(context);
  });
  for (std::size_t r = 1; r < ends.size(); ++r) EXPECT_TRUE(ends[r].error) << "rank " << r;
}

TEST_P(Errors, say_how_many_operations_may_be_in_flight) {
  const auto ends = run_all(GetParam(), [](const Context& context) {
    const std::vector<std::int32_t> ids(8, 0);
    const Plan plan = make_plan(context, ConstTensor(ids.data(), Shape{4, 2}), {.experts = 4});
    const Array x(DType::f32, Shape{4, 16});
    std::vector<PendingDispatch> pending;
    const Error error = error_of([&] {
      while (pending.size() < 1000) pending.push_back(start_dispatch(context, x, {}, plan));
    });
    require(error.message() ==
                std::to_string(pending.size()) + " operations are in flight; finish one before the next is started",
            error.what());
    require(pending.size() >= 8, "too few");
    throw error;
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::bad_argument);
}

INSTANTIATE_TEST_SUITE_P(Ways, Errors, testing::ValuesIn(every_way()), way_name);

}  // namespace
}  // namespace expar::test
