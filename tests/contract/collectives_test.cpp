// What the collectives promise, on every way of connecting ranks.
#include <gtest/gtest.h>

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

INSTANTIATE_TEST_SUITE_P(Ways, Collectives, testing::ValuesIn(every_way()), way_name);

}  // namespace
}  // namespace expar::test
