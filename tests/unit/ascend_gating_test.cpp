// Ascend's routers against sorted scores in double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include <expar/ascend/gating.h>

#include "tests/error_of.h"
#include "tests/unit/ascend_testing.h"

namespace expar::ascend {
namespace {

using Doubles = std::vector<double>;

Doubles row_of(const ConstTensor& tensor, std::int64_t n) {
  Doubles row;
  for (std::int64_t i = 0; i < tensor.size(1); ++i) row.push_back(double{number(tensor, n * tensor.size(1) + i)});
  return row;
}

Doubles softmax(Doubles row) {
  const double most = *std::max_element(row.begin(), row.end());
  for (double& value : row) value = std::exp(value - most);
  const double sum = std::accumulate(row.begin(), row.end(), 0.0);
  for (double& value : row) value /= sum;
  return row;
}

/// Places of the k largest, the lower of equals first.
std::vector<int> largest(const Doubles& values, std::int64_t k) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return values[static_cast<std::size_t>(a)] > values[static_cast<std::size_t>(b)];
  });
  order.resize(static_cast<std::size_t>(k));
  return order;
}

/// The choice of moe_gating_top_k, by its description.
std::vector<int> chosen(const Doubles& scores, const GatingOptions& options, std::int64_t k) {
  Doubles values = scores;
  for (std::size_t e = 0; e < values.size() && !options.bias.absent(); ++e) {
    values[e] += double{number(options.bias, static_cast<std::int64_t>(e))};
  }
  const auto size = static_cast<std::int64_t>(values.size()) / options.group_count;
  Doubles worths;
  for (std::int64_t g = 0; g < options.group_count; ++g) {
    Doubles group(values.begin() + g * size, values.begin() + (g + 1) * size);
    std::sort(group.rbegin(), group.rend());
    worths.push_back(group[0] + (options.group_select_mode == 1 && size > 1 ? group[1] : 0));
  }
  const std::vector<int> groups = largest(worths, options.k_group);
  for (std::size_t e = 0; e < values.size(); ++e) {
    if (std::find(groups.begin(), groups.end(), static_cast<int>(e) / static_cast<int>(size)) == groups.end()) {
      values[e] = -std::numeric_limits<double>::infinity();
    }
  }
  return largest(values, k);
}

TEST(AscendGating, chooses_the_largest_of_the_softmax) {
  on_one_rank([](const Context& context) {
    Draw draw(1);
    for (int round = 0; round < 40; ++round) {
      const std::int64_t tokens = draw.number(0, 70), experts = draw.number(1, 80);
      const std::int64_t k = draw.number(1, std::min<std::int64_t>(experts, 16));
      const DType dtype = draw.dtype();
      const Array x = draw.reals(dtype, {tokens, experts}), finished = draw.integers(DType::int32, {tokens}, 0, 1);
      Array mask(DType::int8, {tokens});
      for (std::int64_t n = 0; n < tokens; ++n)
        mask.as<std::int8_t>()[n] = static_cast<std::int8_t>(integer(finished, n));
      const SoftmaxGating got = moe_gating_top_k_softmax(context, x, mask, k);
      EXPECT_EQ(ConstTensor(got.y).dtype(), dtype);
      for (std::int64_t n = 0; n < tokens; ++n) {
        const Doubles scores = softmax(row_of(x, n));
        const std::vector<int> wanted = largest(scores, k);
        for (std::int64_t j = 0; j < k; ++j) {
          const auto at = static_cast<std::size_t>(wanted[static_cast<std::size_t>(j)]);
          EXPECT_NEAR(double{number(got.y, n * k + j)}, scores[at], scores[at] * relative(dtype) + 1e-7);
          EXPECT_EQ(integer(got.row_idx, n * k + j), j * tokens + n);
          EXPECT_EQ(integer(got.expert_idx, n * k + j),
                    integer(finished, n) != 0 ? experts : static_cast<std::int64_t>(at));
        }
      }
    }
  });
}

TEST(AscendGating, gives_ties_to_the_lower_expert) {
  on_one_rank([](const Context& context) {
    const std::vector<float> x{1, 2, 2, 1, 2, 1};
    const SoftmaxGating plain = moe_gating_top_k_softmax(context, {x.data(), {1, 6}}, {}, 4);
    const Gating grouped = moe_gating_top_k(context, {x.data(), {1, 6}}, 2, {.k_group = 1, .group_count = 3});
    const std::vector<std::int64_t> wanted{1, 2, 4, 0};
    for (std::int64_t j = 0; j < 4; ++j) EXPECT_EQ(integer(plain.expert_idx, j), wanted[static_cast<std::size_t>(j)]);
    EXPECT_EQ(integer(grouped.expert_idx, 0), 1);  // the groups are equally good: the first
    EXPECT_EQ(integer(grouped.expert_idx, 1), 0);
  });
}

TEST(AscendGating, chooses_in_the_best_groups_and_weighs_by_unbiased_scores) {
  on_one_rank([](const Context& context) {
    Draw draw(2);
    for (int round = 0; round < 120; ++round) {
      GatingOptions options;
      options.group_count = draw.number(1, 5);
      options.k_group = draw.number(1, options.group_count);
      const std::int64_t size = draw.number(1, 16), experts = size * options.group_count, tokens = draw.number(1, 70);
      const std::int64_t k = draw.number(1, std::min<std::int64_t>(size * options.k_group, 12));
      options.group_select_mode = draw.number(0, 1);
      options.renorm = draw.number(0, 1);
      options.norm_type = draw.number(0, 1);
      options.out_flag = draw.number(0, 1) == 1;
      options.routed_scaling_factor = draw.number(0, 1) == 1 ? 2.5F : 1;
      options.eps = draw.number(0, 1) == 1 ? 0.25F : 1e-20F;
      const DType dtype = draw.dtype();
      const Array x = draw.reals(dtype, {tokens, experts}), bias = draw.reals(draw.dtype(), {experts});
      if (draw.number(0, 1) == 1) options.bias = bias;
      const Gating got = moe_gating_top_k(context, x, k, options);
      EXPECT_EQ(static_cast<bool>(got.out), options.out_flag);
      for (std::int64_t n = 0; n < tokens; ++n) {
        Doubles scores = row_of(x, n);
        if (options.norm_type == 0) {
          scores = softmax(scores);
        } else {
          for (double& value : scores) value = 1 / (1 + std::exp(-value));
        }
        const std::vector<int> wanted = chosen(scores, options, k);
        double sum = 0;
        for (const int e : wanted) sum += scores[static_cast<std::size_t>(e)];
        const bool divides = options.renorm == 1 || options.norm_type == 1;
        for (std::int64_t j = 0; j < k; ++j) {
          const int e = wanted[static_cast<std::size_t>(j)];
          ASSERT_EQ(integer(got.expert_idx, n * k + j), e) << "round " << round << " token " << n;
          const double weight = scores[static_cast<std::size_t>(e)] / (divides ? sum + double{options.eps} : 1) *
                                double{options.routed_scaling_factor};
          EXPECT_NEAR(double{number(got.y, n * k + j)}, weight, weight * relative(dtype) + 1e-7);
        }
        for (std::int64_t e = 0; e < experts && options.out_flag; ++e) {
          EXPECT_NEAR(double{number(got.out, n * experts + e)}, scores[static_cast<std::size_t>(e)], 1e-6);
        }
      }
    }
  });
}

TEST(AscendGating, goes_where_a_table_of_token_ids_says) {
  on_one_rank([](const Context& context) {
    const std::vector<float> x{0, 1, 2, 0, 1, 2};
    const std::vector<std::int64_t> tokens{2, 0};
    const std::vector<std::int32_t> table{0, 1, 1, 2, 2, 0};
    const Gating got =
        moe_gating_top_k(context, {x.data(), {2, 3}}, 2,
                         {.input_ids = {tokens.data(), {2}}, .tid2eid = {table.data(), {3, 2}}, .renorm = 1});
    const double scores[2][2] = {{std::exp(2), std::exp(0)}, {std::exp(0), std::exp(1)}};
    const std::int64_t ids[4] = {2, 0, 0, 1};
    for (std::int64_t i = 0; i < 4; ++i) {
      EXPECT_EQ(integer(got.expert_idx, i), ids[i]);
      const auto& row = scores[i / 2];
      EXPECT_NEAR(double{number(got.y, i)}, row[i % 2] / (row[0] + row[1]), 1e-6);
    }
  });
}

TEST(AscendGating, refuses_what_is_out_of_its_range) {
  on_one_rank([](const Context& context) {
    const Array x(DType::f32, {3, 12}), wrong(DType::int32, {3, 12}), bias(DType::f32, {11}), flags(DType::int8, {4});
    const Array ids(DType::int32, {3}), table(DType::int32, {5, 2}), far(DType::int64, {3}),
        worse(DType::int32, {5, 2});
    far.as<std::int64_t>()[1] = 5;
    worse.as<std::int32_t>()[1] = 12;
    const auto refusal = [&](const GatingOptions& options, std::int64_t k = 2) {
      return test::refusal_of([&] { moe_gating_top_k(context, x, k, options); });
    };
    EXPECT_EQ(refusal({}, 0), "k is 0, should be from 1 to 12");
    EXPECT_EQ(refusal({.k_group = 2, .group_count = 4}, 7), "k is 7, should be from 1 to 6");
    EXPECT_EQ(refusal({.group_count = 0}), "group_count is 0, should be from 1 to 12");
    EXPECT_EQ(refusal({.group_count = 5}), "group_count is 5, should divide the 12 experts of x");
    EXPECT_EQ(refusal({.k_group = 3, .group_count = 2}), "k_group is 3, should be from 1 to 2");
    EXPECT_EQ(refusal({.group_select_mode = 2}), "group_select_mode is 2, should be from 0 to 1");
    EXPECT_EQ(refusal({.renorm = -1}), "renorm is -1, should be from 0 to 1");
    EXPECT_EQ(refusal({.norm_type = 2}), "norm_type is 2, should be from 0 to 1");
    EXPECT_EQ(refusal({.bias = bias}), "bias is f32 [11], should be f32 [12]");
    EXPECT_EQ(refusal({.input_ids = ids}), "input_ids is given without tid2eid");
    EXPECT_EQ(refusal({.tid2eid = table}), "tid2eid is given without input_ids");
    EXPECT_EQ(refusal({.input_ids = ids, .tid2eid = table}, 3), "tid2eid is int32 [5, 2], should be int32 [5, 3]");
    EXPECT_EQ(refusal({.input_ids = far, .tid2eid = table}), "input_ids[1] is 5, should be from 0 to 4");
    EXPECT_EQ(refusal({.input_ids = ids, .tid2eid = worse}), "tid2eid[0,1] is 12, should be from 0 to 11");
    EXPECT_EQ(refusal({.input_ids = ids, .tid2eid = table, .group_count = 2}),
              "tid2eid chooses alone, without bias and groups");
    const auto softmax_refusal = [&](ConstTensor logits, ConstTensor finished, std::int64_t k) {
      return test::refusal_of([&] { moe_gating_top_k_softmax(context, logits, finished, k); });
    };
    EXPECT_EQ(softmax_refusal(x, {}, 13), "k is 13, should be from 1 to 12");
    EXPECT_EQ(softmax_refusal(x, flags, 1), "finished is int8 [4], should be int8 [3]");
    EXPECT_EQ(softmax_refusal(wrong, {}, 1), "x is int32 [3, 12], should be f32, bf16 or f16");
    EXPECT_EQ(softmax_refusal(ids, {}, 1), "x is int32 [3], should have 2 axes");
  });
}

TEST(AscendGating, prefers_every_number_to_nan) {
  on_one_rank([](const Context& context) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> x{nan, -3, nan, 2}, bias{0, 0, nan, nan};
    const Gating plain = moe_gating_top_k(context, ConstTensor(x.data(), Shape{1, 4}), 2, {.norm_type = 1});
    EXPECT_EQ(plain.expert_idx.as<std::int32_t>()[0], 3);
    EXPECT_EQ(plain.expert_idx.as<std::int32_t>()[1], 1);
    const Gating biased = moe_gating_top_k(context, ConstTensor(x.data(), Shape{1, 4}), 1,
                                           {.bias = ConstTensor(bias.data(), Shape{4}), .norm_type = 1});
    EXPECT_EQ(biased.expert_idx.as<std::int32_t>()[0], 1);
  });
}

}  // namespace
}  // namespace expar::ascend
