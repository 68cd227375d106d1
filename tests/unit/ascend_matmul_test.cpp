// The grouped product against sums in double precision; int8 exactly.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include <expar/ascend/activation.h>
#include <expar/ascend/init_routing.h>
#include <expar/ascend/matmul.h>

#include "tests/error_of.h"
#include "tests/unit/ascend_testing.h"

namespace expar::ascend {
namespace {

/// Rows of groups, as counts and as sums.
struct Groups {
  Groups(Draw& draw, std::int64_t count, std::int64_t most) {
    for (std::int64_t g = 0; g < count; ++g) counts.push_back(draw.number(0, most));
    for (const std::int64_t number : counts) sums.push_back(total += number);
  }
  ConstTensor list(std::int64_t type) const {
    return {type == 0 ? sums.data() : counts.data(), {static_cast<std::int64_t>(counts.size())}};
  }
  /// The group of a row; below 0: of none.
  std::int64_t of(std::int64_t row) const {
    return row >= total ? -1 : std::upper_bound(sums.begin(), sums.end(), row) - sums.begin();
  }

  std::vector<std::int64_t> counts, sums;
  std::int64_t total = 0;
};

Array small_integers(Draw& draw, Shape shape) {
  Array array(DType::int8, shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i)
    array.as<std::int8_t>()[i] = static_cast<std::int8_t>(draw.number(-128, 127));
  return array;
}

TEST(AscendMatmul, multiplies_rows_by_the_matrix_of_their_group) {
  on_one_rank([](const Context& context) {
    Draw draw(1);
    for (int round = 0; round < 60; ++round) {
      const std::int64_t e = draw.number(1, 5), k = draw.number(0, 70), n = draw.number(1, 90),
                         type = draw.number(0, 1);
      const Groups groups(draw, e, 20);
      const std::int64_t m = groups.total + draw.number(0, 3);
      const DType dtype = draw.dtype(), out = draw.number(0, 1) == 0 ? dtype : draw.dtype();
      const Array x = draw.reals(dtype, {m, k}), weight = draw.reals(dtype, {e, k, n});
      const Array bias = draw.reals(draw.dtype(), {e, n});
      GroupedMatmulOptions options{.group_list = groups.list(type), .group_list_type = type};
      if (out != dtype) options.output_dtype = out;
      const bool is_biased = draw.number(0, 1) == 1;
      if (is_biased) options.bias = bias;
      const Array y = grouped_matmul(context, x, weight, options);
      ASSERT_EQ(y.view().dtype(), out);
      for (std::int64_t i = 0; i < m * n; ++i) {
        const std::int64_t group = groups.of(i / n);
        double sum = 0, size = 0;
        for (std::int64_t j = 0; j < k && group >= 0; ++j) {
          const double term = double{number(x, i / n * k + j)} * double{number(weight, (group * k + j) * n + i % n)};
          sum += term;
          size += std::abs(term);
        }
        if (is_biased && group >= 0) sum += double{number(bias, group * n + i % n)};
        EXPECT_NEAR(double{number(y, i)}, sum, std::abs(sum) * relative(out) + size * 1e-5 + 1e-6);
      }
    }
  });
}

TEST(AscendMatmul, splits_the_sum_for_the_gradient_of_the_matrices) {
  on_one_rank([](const Context& context) {
    Draw draw(2);
    for (int round = 0; round < 40; ++round) {
      const std::int64_t e = draw.number(1, 5), m = draw.number(1, 40), n = draw.number(1, 70),
                         type = draw.number(0, 1);
      const Groups groups(draw, e, 30);
      const std::int64_t k = groups.total + draw.number(0, 3);
      const DType dtype = draw.dtype(), out = draw.number(0, 1) == 0 ? dtype : draw.dtype();
      const Array x = draw.reals(dtype, {k, m}), weight = draw.reals(dtype, {k, n});
      GroupedMatmulOptions options{.group_list = groups.list(type), .group_type = 2, .group_list_type = type};
      if (out != dtype) options.output_dtype = out;
      const Array y = grouped_matmul(context, x, weight, options);
      ASSERT_EQ(y.view().shape(), (Shape{e, m, n}));
      ASSERT_EQ(y.view().dtype(), out);
      for (std::int64_t i = 0; i < e * m * n; ++i) {
        double sum = 0, size = 0;
        for (std::int64_t row = 0; row < k; ++row) {
          if (groups.of(row) != i / (m * n)) continue;
          const double term = double{number(x, row * m + i / n % m)} * double{number(weight, row * n + i % n)};
          sum += term;
          size += std::abs(term);
        }
        EXPECT_NEAR(double{number(y, i)}, sum, std::abs(sum) * relative(out) + size * 1e-5);
      }
    }
  });
}

TEST(AscendMatmul, sums_products_of_int8_exactly_and_scales_them) {
  on_one_rank([](const Context& context) {
    Draw draw(3);
    for (int round = 0; round < 40; ++round) {
      const std::int64_t e = draw.number(1, 4), k = draw.number(0, 300), n = draw.number(1, 300),
                         type = draw.number(0, 1);
      const Groups groups(draw, e, 12);
      const std::int64_t m = groups.total + draw.number(0, 3);
      const Array x = small_integers(draw, {m, k}), weight = small_integers(draw, {e, k, n});
      const Array bias = draw.integers(DType::int32, {e, n}, -5000, 5000), scale = draw.reals(DType::f32, {e, n});
      const Array after = draw.reals(draw.dtype(), {e, n}), token = draw.reals(DType::f32, {m});
      const bool is_biased = draw.number(0, 1) == 1, is_plain = draw.number(0, 1) == 1,
                 is_by_token = draw.number(0, 1) == 1;
      const DType out = is_plain ? DType::int32 : draw.dtype();
      GroupedMatmulOptions options{.group_list = groups.list(type), .group_list_type = type, .output_dtype = out};
      const bool is_whole = is_plain || draw.number(0, 1) == 1;
      if (is_biased) options.bias = is_whole ? bias : after;
      if (!is_plain) options.scale = scale;
      if (!is_plain && is_by_token) options.per_token_scale = token;
      const Array y = grouped_matmul(context, x, weight, options);
      for (std::int64_t i = 0; i < m * n; ++i) {
        const std::int64_t group = groups.of(i / n), own = group * n + i % n;
        std::int64_t sum = is_biased && is_whole && group >= 0 ? integer(bias, own) : 0;
        for (std::int64_t j = 0; j < k && group >= 0; ++j) {
          sum +=
              std::int64_t{x.as<std::int8_t>()[i / n * k + j]} * weight.as<std::int8_t>()[(group * k + j) * n + i % n];
        }
        if (is_plain) {
          ASSERT_EQ(y.as<std::int32_t>()[i], sum);
        } else {
          const double added = is_biased && !is_whole && group >= 0 ? double{number(after, own)} : 0;
          const double wanted = group < 0 ? 0
                                          : static_cast<double>(sum) * double{number(scale, own)} *
                                                    (is_by_token ? double{number(token, i / n)} : 1) +
                                                added;
          // Of f16 the largest are infinite.
          if (out == DType::f16 && std::abs(wanted) > 65000) continue;
          ASSERT_NEAR(double{number(y, i)}, wanted, (std::abs(wanted) + std::abs(added)) * relative(out) + 1e-7);
        }
      }
    }
  });
}

TEST(AscendMatmul, sums_the_largest_products_of_int8_exactly) {
  on_one_rank([](const Context& context) {
    constexpr std::int64_t kInner = 3000;
    Array x(DType::int8, {2, kInner}), weight(DType::int8, {1, kInner, 2});
    for (std::int64_t k = 0; k < kInner; ++k) {
      for (const std::int64_t i : {0, 1}) {
        x.as<std::int8_t>()[i * kInner + k] = i == 0 ? -128 : 127;
        weight.as<std::int8_t>()[k * 2 + i] = i == 0 ? -128 : 127;
      }
    }
    const std::int64_t rows = 2;
    const Array y = grouped_matmul(context, x, weight, {.group_list = {&rows, {1}}, .output_dtype = DType::int32});
    const std::int64_t wanted[4] = {16384, -16256, -16256, 16129};
    for (std::int64_t i = 0; i < 4; ++i) EXPECT_EQ(integer(y, i), wanted[i] * kInner);
  });
}

TEST(AscendMatmul, is_close_in_int8_to_an_expert_in_f32) {
  on_one_rank([](const Context& context) {
    Draw draw(4);
    const std::int64_t tokens = 40, hidden = 64, inner = 32, experts = 4;
    const Array x = draw.reals(DType::f32, {tokens, hidden}), up = draw.reals(DType::f32, {experts, hidden, 2 * inner});
    const Array ids = draw.integers(DType::int32, {tokens, 2}, 0, experts - 1);
    InitRoutingOptions routing{.expert_num = experts, .expert_tokens_num_type = 1, .expert_tokens_num_flag = true};
    const InitRoutingV2 plain = moe_init_routing_v2(context, x, ids, routing);
    routing.quant_mode = 1;
    const InitRoutingV2 low = moe_init_routing_v2(context, x, ids, routing);
    // A scale for each column, as checkpoints of W8A8 have them.
    Array up8(DType::int8, {experts, hidden, 2 * inner}), scale(DType::f32, {experts, 2 * inner});
    for (std::int64_t c = 0; c < experts * 2 * inner; ++c) {
      const auto at = [&](std::int64_t k) { return (c / (2 * inner) * hidden + k) * 2 * inner + c % (2 * inner); };
      float most = 0;
      for (std::int64_t k = 0; k < hidden; ++k) most = std::max(most, std::abs(number(up, at(k))));
      scale.as<float>()[c] = most / 127;
      for (std::int64_t k = 0; k < hidden; ++k) {
        up8.as<std::int8_t>()[at(k)] = static_cast<std::int8_t>(std::nearbyint(number(up, at(k)) / most * 127));
      }
    }
    const ConstTensor counts = plain.expert_token_cumsum_or_count;
    const Array wanted =
        swiglu(context, grouped_matmul(context, plain.expanded_x, up, {.group_list = counts, .group_list_type = 1}));
    const Array sums = grouped_matmul(context, low.expanded_x, up8,
                                      {.group_list = counts, .group_list_type = 1, .output_dtype = DType::int32});
    const QuantisedRows got = dequant_swiglu_quant(context, sums,
                                                   {.weight_scale = scale,
                                                    .activation_scale = low.expanded_scale,
                                                    .group_index = counts,
                                                    .activate_left = true,
                                                    .quant_mode = 1});
    double error = 0, size = 0;
    for (std::int64_t i = 0; i < tokens * 2 * inner; ++i) {
      const double value = got.y.as<std::int8_t>()[i] * double{number(got.scale, i / inner)};
      error += std::pow(value - double{number(wanted, i)}, 2);
      size += std::pow(double{number(wanted, i)}, 2);
    }
    EXPECT_LT(std::sqrt(error / size), 0.02);
    EXPECT_GT(error, 0);
  });
}

TEST(AscendMatmul, refuses_what_does_not_fit) {
  on_one_rank([](const Context& context) {
    const Array x(DType::f32, {4, 3}), weight(DType::f32, {2, 3, 5}), other(DType::bf16, {2, 3, 5});
    const Array x8(DType::int8, {4, 3}), weight8(DType::int8, {2, 3, 5}), matrix(DType::f32, {4, 5});
    const Array bias(DType::f32, {2, 5}), wrong(DType::f32, {2, 4}), long_x(DType::int8, {0, 131072});
    const Array long_weight(DType::int8, {1, 131072, 0});
    const std::vector<std::int64_t> good{2, 4}, many{3, 2}, three{1, 1, 1}, none{0};
    const auto list = [](const std::vector<std::int64_t>& v) {
      return ConstTensor(v.data(), {static_cast<std::int64_t>(v.size())});
    };
    const auto refusal = [&](ConstTensor rows, ConstTensor matrices, const GroupedMatmulOptions& options) {
      return test::refusal_of([&] { grouped_matmul(context, rows, matrices, options); });
    };
    const auto of_f32 = [&](const GroupedMatmulOptions& options) { return refusal(x, weight, options); };
    const auto of_int8 = [&](const GroupedMatmulOptions& options) { return refusal(x8, weight8, options); };
    EXPECT_EQ(of_f32({}), "group_list is missing");
    EXPECT_EQ(of_f32({.group_list = list(good), .group_type = 1}), "group_type is 1, should be 0 or 2");
    EXPECT_EQ(of_f32({.group_list = list(good), .group_list_type = 2}), "group_list_type is 2, should be from 0 to 1");
    EXPECT_EQ(of_f32({.group_list = list(three)}), "group_list is int64 [3], should be int64 [2]");
    EXPECT_EQ(of_f32({.group_list = list(many)}), "group_list[1] is 2, should be from 3 to 4");
    EXPECT_EQ(of_f32({.group_list = list(many), .group_list_type = 1}), "group_list[1] is 2, should be from 0 to 1");
    EXPECT_EQ(of_f32({.bias = wrong, .group_list = list(good)}), "bias is f32 [2, 4], should be f32 [2, 5]");
    EXPECT_EQ(of_f32({.scale = bias, .group_list = list(good)}), "scale is given with x of f32, which takes none");
    EXPECT_EQ(of_f32({.per_token_scale = bias, .group_list = list(good)}),
              "per_token_scale is given with x of f32, which takes none");
    EXPECT_EQ(of_f32({.group_list = list(good), .output_dtype = DType::int8}),
              "output_dtype is int8, should be f32, bf16 or f16");
    EXPECT_EQ(refusal(x, other, {.group_list = list(good)}), "weight is bf16 [2, 3, 5], should be f32 [2, 3, 5]");
    EXPECT_EQ(refusal(x, matrix, {.group_list = list(good)}), "weight is f32 [4, 5], should have 3 axes");
    EXPECT_EQ(refusal(weight, weight, {.group_list = list(good)}), "x is f32 [2, 3, 5], should have 2 axes");
    EXPECT_EQ(of_int8({.group_list = list(good)}), "output_dtype is missing, which x of int8 needs");
    EXPECT_EQ(of_int8({.group_list = list(good), .output_dtype = DType::int8}),
              "output_dtype is int8, should be f32, bf16 or f16, or int32");
    EXPECT_EQ(of_int8({.group_list = list(good), .output_dtype = DType::bf16}),
              "scale is missing, which x of int8 needs");
    EXPECT_EQ(of_int8({.scale = bias, .group_list = list(good), .output_dtype = DType::int32}),
              "scale is given with output_dtype int32, which takes none");
    EXPECT_EQ(of_int8({.bias = bias, .group_list = list(good), .output_dtype = DType::int32}),
              "bias is f32 [2, 5], should be int32 [2, 5]");
    EXPECT_EQ(of_int8({.scale = bias, .per_token_scale = bias, .group_list = list(good), .output_dtype = DType::f32}),
              "per_token_scale is f32 [2, 5], should be f32 [4]");
    EXPECT_EQ(refusal(long_x, long_weight, {.group_list = list(none), .output_dtype = DType::int32}),
              "K of x is 131072, should be from 0 to 131071");
    EXPECT_EQ(refusal(x, matrix, {.bias = bias, .group_list = list(good), .group_type = 2}),
              "bias is given with group_type 2, which takes none");
    EXPECT_EQ(refusal(x8, matrix, {.group_list = list(good), .group_type = 2}),
              "x is int8 [4, 3], should be f32, bf16 or f16");
    EXPECT_EQ(refusal(x, bias, {.group_list = list(good), .group_type = 2}),
              "weight is f32 [2, 5], should be f32 [4, 5]");
  });
}

}  // namespace
}  // namespace expar::ascend
