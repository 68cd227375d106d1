// Rank-major and expert-major rows, against rows that carry their rank, their expert and their number.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include <expar/error.h>
#include <expar/permute.h>
#include <expar/random.h>

#include "tests/error_of.h"

namespace expar {
namespace {

using Label = std::tuple<std::size_t, int, std::int64_t>;  // expert, rank, number: in expert-major order they ascend

/// As they stand after an all-to-all.
std::vector<Label> rank_major(const std::vector<std::int64_t>& counts, int ranks) {
  const std::size_t experts = counts.size() / static_cast<std::size_t>(ranks);
  std::vector<Label> labels;
  for (int r = 0; r < ranks; ++r) {
    for (std::size_t e = 0; e < experts; ++e) {
      for (std::int64_t i = 0; i < counts[static_cast<std::size_t>(r) * experts + e]; ++i) labels.push_back({e, r, i});
    }
  }
  return labels;
}

std::vector<std::vector<std::int64_t>> cases(int ranks) {
  const auto of = static_cast<std::size_t>(ranks);
  std::vector<std::vector<std::int64_t>> all{
      std::vector<std::int64_t>(of, 3), std::vector<std::int64_t>(3 * of, 0), {}};
  const Random random(1, "permute");
  for (std::uint64_t draw = 0; draw < 20; ++draw) {
    std::vector<std::int64_t> counts(5 * of);
    for (std::size_t i = 0; i < counts.size(); ++i) {
      counts[i] = static_cast<std::int64_t>(random.bits(draw * 1000 + i) % 4);  // a quarter of them nothing
    }
    all.push_back(counts);
  }
  return all;
}

TEST(Permute, orders_rows_by_expert_and_those_of_an_expert_by_rank) {
  for (const int ranks : {1, 2, 3, 8}) {
    for (const auto& counts : cases(ranks)) {
      const std::vector<Label> before = rank_major(counts, ranks);
      std::vector<Label> wanted = before, got;
      std::sort(wanted.begin(), wanted.end());
      const ExpertMajor order = expert_major(counts, ranks);
      for (const std::int32_t i : order.indices) got.push_back(before.at(static_cast<std::size_t>(i)));
      EXPECT_EQ(got, wanted);
      ASSERT_EQ(order.rows.size(), counts.size() / static_cast<std::size_t>(ranks));
      for (std::size_t e = 0; e < order.rows.size(); ++e) {
        const auto is_of = [&](const Label& label) { return std::get<0>(label) == e; };
        EXPECT_EQ(order.rows[e], std::count_if(before.begin(), before.end(), is_of));
      }
    }
  }
}

TEST(Permute, gives_the_order_that_can_be_worked_out_by_hand) {
  // rank 0: a a b, rank 1: a c c; experts a, b, c
  const ExpertMajor order = expert_major(std::vector<std::int64_t>{2, 1, 0, 1, 0, 2}, 2);
  EXPECT_EQ(order.indices, (std::vector<std::int32_t>{0, 1, 3, 2, 4, 5}));
  EXPECT_EQ(order.rows, (std::vector<std::int64_t>{3, 1, 2}));
}

TEST(Permute, moves_rows_of_any_shape_there_and_back) {
  const ExpertMajor order = expert_major(std::vector<std::int64_t>{2, 1, 0, 1, 0, 2}, 2);
  for (const Shape& shape : {Shape{6}, Shape{6, 5}, Shape{6, 2, 3}, Shape{6, 0}}) {
    const Array rows(DType::bf16, shape), there(DType::bf16, shape), back(DType::bf16, shape);
    const std::int64_t width = shape.elements() / 6;
    for (std::int64_t i = 0; i < shape.elements(); ++i) rows.as<bf16>()[i].bits = static_cast<std::uint16_t>(i + 1);
    permute_rows(rows, order.indices, there);
    unpermute_rows(there, order.indices, back);
    for (std::int64_t i = 0; i < shape.elements(); ++i) {
      const std::int64_t from = order.indices[static_cast<std::size_t>(i / width)];
      EXPECT_EQ(there.as<bf16>()[i].bits, from * width + i % width + 1);
      EXPECT_EQ(back.as<bf16>()[i].bits, i + 1);
    }
  }
}

TEST(Permute, takes_no_rows_at_all) {
  const ExpertMajor order = expert_major(std::vector<std::int64_t>(6, 0), 2);
  EXPECT_TRUE(order.indices.empty());
  EXPECT_EQ(order.rows, std::vector<std::int64_t>(3, 0));
  const Array rows(DType::f32, {0, 4}), out(DType::f32, {0, 4});
  permute_rows(rows, order.indices, out);
  unpermute_rows(out, order.indices, rows);
}

TEST(Permute, refuses_what_is_no_order_of_the_rows) {
  const Array rows(DType::f32, {3, 2}), out(DType::f32, {3, 2}), narrow(DType::f32, {3, 1});
  const auto permute = [&](const std::vector<std::int32_t>& indices, const Array& to) {
    return test::refusal_of([&] { permute_rows(rows, indices, to); });
  };
  EXPECT_EQ(permute({0, 1, 3}, out), "indices[2] = 3 is none of the 3 rows");
  EXPECT_EQ(permute({0, -1, 2}, out), "indices[1] = -1 is none of the 3 rows");
  EXPECT_EQ(permute({2, 1, 2}, out), "indices[2] = 2 is there twice, the first time at 0");
  EXPECT_EQ(permute({1, 0}, out), "2 indices for 3 rows");
  EXPECT_EQ(permute({0, 1, 2}, narrow), "rows are f32 [3, 2], out is f32 [3, 1]");
  const auto order = [&](const std::vector<std::int64_t>& counts, int ranks) {
    return test::refusal_of([&] { expert_major(counts, ranks); });
  };
  EXPECT_EQ(order({1, 2, 3}, 2), "3 counts are not those of 2 ranks");
  EXPECT_EQ(order({1, 2, -3}, 3), "counts[2] = -3 is below 0");
  EXPECT_EQ(order({std::int64_t{1} << 31}, 1), "the counts are more than 2^31 - 1 rows");
}

}  // namespace
}  // namespace expar
