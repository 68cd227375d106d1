// What the collectives promise, on every way of connecting ranks.
#include <gtest/gtest.h>

#include <functional>
#include <numeric>

#include <expar/collectives.h>

#include "tests/contract/routes.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

class Collectives : public EveryWay {};

std::vector<float> numbers(std::int64_t count, float first) {
  std::vector<float> values(static_cast<std::size_t>(count));
  std::iota(values.begin(), values.end(), first);
  return values;
}

TEST_P(Collectives, holds_every_rank_until_all_have_entered) {
  Shared<std::array<std::atomic<int>, 300>> entered;
  run(GetParam(), [&](const Context& context) {
    for (std::size_t round = 0; round < entered->size(); ++round) {
      ++(*entered)[round];
      barrier(context);
      require_equal((*entered)[round].load(), context.size(), "ranks in the barrier");
    }
  });
}

TEST_P(Collectives, broadcasts_from_any_root) {
  run(GetParam(), [](const Context& context) {
    for (int root = 0; root < context.size(); ++root) {
      for (const std::int64_t n : {0, 1, 1000, 70000}) {
        auto data = numbers(n, static_cast<float>(context.rank()));
        broadcast(context, Tensor(data.data(), Shape{n}), root);
        require(data == numbers(n, static_cast<float>(root)), "broadcast of " + std::to_string(n));
      }
    }
  });
}

TEST_P(Collectives, gathers_uneven_rows_in_rank_order) {
  run(GetParam(), [](const Context& context) {
    const auto rows_of = [](int rank) -> std::int64_t { return (rank * 3 + 1) % 4; };
    std::vector<float> wanted;
    for (int r = 0; r < context.size(); ++r) {
      const auto part = numbers(rows_of(r) * 5, static_cast<float>(100 * r));
      wanted.insert(wanted.end(), part.begin(), part.end());
    }
    const auto mine = numbers(rows_of(context.rank()) * 5, static_cast<float>(100 * context.rank()));
    std::vector<float> out(wanted.size());
    all_gather(context, ConstTensor(mine.data(), Shape{rows_of(context.rank()), 5}),
               Tensor(out.data(), Shape{static_cast<std::int64_t>(wanted.size() / 5), 5}));
    require(out == wanted, "gathered rows");
  });
}

/// Rows whose sum depends on the order of summation.
std::vector<float> awkward_row(std::int64_t row, std::int64_t n) {
  std::vector<float> values;
  for (std::int64_t i = 0; i < n; ++i)
    values.push_back((row % 3 == 0 ? 1e8F : 1.0F) / static_cast<float>(1 + (row * 7 + i) % 13) *
                     (row % 2 == 0 ? 1.0F : -1.0F));
  return values;
}

TEST_P(Collectives, sums_rows_in_global_order_however_they_are_held) {
  run(GetParam(), [](const Context& context) {
    for (const std::int64_t n : {1, 7, 1024, 5000}) {
      constexpr std::int64_t kRows = 8;
      const auto begin = kRows * context.rank() / context.size(), end = kRows * (context.rank() + 1) / context.size();
      std::vector<float> mine, wanted(static_cast<std::size_t>(n), 0.0F);
      for (std::int64_t row = 0; row < kRows; ++row) {
        const auto values = awkward_row(row, n);
        for (std::size_t i = 0; i < values.size(); ++i) wanted[i] += values[i];
        if (row >= begin && row < end) mine.insert(mine.end(), values.begin(), values.end());
      }
      const ConstTensor rows(mine.data(), Shape{end - begin, n});
      std::vector<float> out(static_cast<std::size_t>(n));
      all_reduce(context, rows, Tensor(out.data(), Shape{n}));
      require(out == wanted, "all_reduce of " + std::to_string(n));
      const Part part = part_of(n, context.rank(), context.size());
      std::vector<float> own(static_cast<std::size_t>(part.end - part.begin));
      reduce_scatter(context, rows, Tensor(own.data(), Shape{part.end - part.begin}));
      require(std::equal(own.begin(), own.end(), wanted.begin() + part.begin),
              "reduce_scatter of " + std::to_string(n));
    }
  });
}

TEST_P(Collectives, sends_any_number_of_rows_to_any_rank) {
  run(GetParam(), [](const Context& context) {
    const auto count = [](int from, int to) -> std::int64_t { return (from * 5 + to * 3) % 4; };
    const auto element = [](int from, int to, std::int64_t i) {
      return static_cast<float>(from * 1000 + to * 100 + i);
    };
    std::vector<std::int64_t> sends, receives;
    std::vector<float> in, wanted;
    for (int p = 0; p < context.size(); ++p) {
      sends.push_back(count(context.rank(), p));
      receives.push_back(count(p, context.rank()));
      for (std::int64_t i = 0; i < sends.back() * 3; ++i) in.push_back(element(context.rank(), p, i));
      for (std::int64_t i = 0; i < receives.back() * 3; ++i) wanted.push_back(element(p, context.rank(), i));
    }
    std::vector<float> out(wanted.size());
    all_to_all_v(context, ConstTensor(in.data(), Shape{static_cast<std::int64_t>(in.size() / 3), 3}), sends,
                 Tensor(out.data(), Shape{static_cast<std::int64_t>(out.size() / 3), 3}), receives);
    require(out == wanted, "received rows");
  });
}

TEST_P(Collectives, refuse_what_does_not_fit_on_every_rank_and_go_on) {
  run(GetParam(), [](const Context& context) {
    const int bad = context.size() - 1;
    const bool mine = context.rank() == bad;
    const auto expect = [&](const std::function<void()>& call, int rank, const std::string& wanted) {
      const Error error = error_of(call);
      require(error.code() == ErrorCode::bad_argument && error.message() == wanted, error.what());
      require_equal(error.rank(), context.communicator().job_rank(rank), "rank of the error");
      barrier(context);
    };
    const std::int64_t ranks = context.size();
    const Array row(DType::f32, {1, 2}), out(DType::f32, {ranks, 2}), longer(DType::f32, {ranks + 1, 2});
    const Array wide(DType::f32, {ranks, 3}), low(DType::bf16, {ranks, 2}), sum(DType::f32, {2});
    for (const int root : {-1, context.size()}) {
      expect([&] { broadcast(context, row, root); }, 0,
             "root " + std::to_string(root) + " is not a rank below " + std::to_string(ranks));
    }
    expect([&] { all_gather(context, row, mine ? longer : out); }, bad,
           "out has " + std::to_string(ranks + 1) + ", not " + std::to_string(ranks) + " rows, the sum over ranks");
    expect([&] { all_gather(context, row, mine ? wide : out); }, bad,
           "in [1, 2] and out [" + std::to_string(ranks) + ", 3] differ in more than the first axis");
    expect([&] { all_gather(context, row, mine ? low : out); }, bad, "in is f32 and out is bf16");
    const Array three(DType::f32, {3}), low_sum(DType::bf16, {2});
    expect([&] { all_reduce(context, row, mine ? three : sum); }, bad, "out has 3, not 2 elements");
    expect([&] { all_reduce(context, row, mine ? low_sum : sum); }, bad, "sums are of f32");
    const Part part = part_of(2, context.rank(), context.size());
    const Array own(DType::f32, {part.end - part.begin});
    expect([&] { reduce_scatter(context, row, mine ? three : own); }, bad,
           "out has 3, not " +
               std::to_string(part_of(2, bad, context.size()).end - part_of(2, bad, context.size()).begin) +
               " elements");
  });
}

TEST_P(Collectives, refuse_counts_of_rows_that_do_not_fit) {
  run(GetParam(), [](const Context& context) {
    const int bad = context.size() - 1;
    const auto ranks = static_cast<std::size_t>(context.size());
    const std::vector<std::int64_t> ones(ranks, 1);
    const Array rows(DType::f32, {context.size(), 2}), out(DType::f32, {context.size(), 2});
    const auto expect = [&](const std::vector<std::int64_t>& sends, const std::vector<std::int64_t>& receives,
                            const std::string& wanted) {
      const bool mine = context.rank() == bad;
      const Error error =
          error_of([&] { all_to_all_v(context, rows, mine ? sends : ones, out, mine ? receives : ones); });
      require(error.code() == ErrorCode::bad_argument && error.message() == wanted, error.what());
      require_equal(error.rank(), context.communicator().job_rank(bad), "rank of the error");
    };
    const std::string all = std::to_string(ranks), more = std::to_string(ranks + 1);
    std::vector<std::int64_t> two = ones, negative = ones;
    two[0] = 2;
    negative[0] = -1;
    expect(two, ones, "in has " + all + ", not " + more + " rows, the sum of send_rows");
    expect(ones, two, "out has " + all + ", not " + more + " rows, the sum of receive_rows");
    expect(negative, ones, "a count of rows for rank 0 is negative");
    expect(std::vector<std::int64_t>(ranks + 1, 1), ones, "the counts of rows do not have one entry per rank");
    all_to_all_v(context, rows, ones, out, ones);
  });
}

TEST_P(Collectives, end_the_job_where_two_ranks_count_different_rows) {
  if (GetParam().ranks == 1) return;
  const auto ends = run_all(GetParam(), [](const Context& context) {
    // Rank 0 sends rank 1 two rows and itself none; rank 1 waits for one from each.
    const auto ranks = static_cast<std::size_t>(context.size());
    std::vector<std::int64_t> sends(ranks, 1);
    if (context.rank() == 0) sends[0] = 0, sends[1] = 2;
    std::vector<std::int64_t> receives(ranks, 1);
    if (context.rank() == 0) receives[0] = 0;
    const Array rows(DType::f32, {context.size(), 2}), out(DType::f32, {context.size() - (context.rank() == 0), 2});
    all_to_all_v(context, rows, sends, out, receives);
    barrier(context);
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::mismatch);
  EXPECT_EQ(error.message(), "rank 0 sends 2 rows, rank 1 expects 1");
}

INSTANTIATE_TEST_SUITE_P(Ways, Collectives, testing::ValuesIn(every_way()), way_name);

}  // namespace
}  // namespace expar::test
