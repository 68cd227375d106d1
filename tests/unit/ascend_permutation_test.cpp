// Rows to their experts and back, against sums in double precision and the operators' descriptions slot by slot.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <expar/ascend/permutation.h>

#include "tests/error_of.h"
#include "tests/unit/ascend_testing.h"

namespace expar::ascend {
namespace {

bool same_row(const ConstTensor& a, std::int64_t i, const ConstTensor& b, std::int64_t j) {
  const ConstTensor row = a.rows(i, 1), other = b.rows(j, 1);
  return row.byte_size() == other.byte_size() &&
         (row.byte_size() == 0 || std::memcmp(row.data(), other.data(), row.byte_size()) == 0);
}

/// (expert, slot) of every slot, ascending: the order that rows must stand in.
std::vector<std::pair<std::int64_t, std::int64_t>> sorted_slots(const ConstTensor& experts) {
  std::vector<std::pair<std::int64_t, std::int64_t>> slots;
  for (std::int64_t i = 0; i < experts.elements(); ++i) slots.emplace_back(integer(experts, i), i);
  std::sort(slots.begin(), slots.end());
  return slots;
}

/// A batch that moe_token_permute has sorted.
struct Batch {
  Batch(Draw& draw, DType dtype)
      : n(draw.number(1, 20)),
        k(draw.number(1, 5)),
        width(draw.number(1, 40)),
        x(draw.reals(dtype, {n, width})),
        experts(draw.integers(draw.number(0, 1) == 1 ? DType::int32 : DType::int64, {n, k}, 0, 6)),
        cut(draw.number(-n * k - 1, n * k + 1)),
        rows(cut == 0  ? n * k
             : cut > 0 ? std::min(cut, n * k)
                       : std::max<std::int64_t>(n * k + cut, 0)) {}

  std::int64_t n, k, width;
  Array x, experts;
  std::int64_t cut, rows;
};

TEST(AscendPermutation, sorts_the_rows_of_slots_by_expert) {
  Draw draw(1);
  for (int round = 0; round < 60; ++round) {
    const Batch batch(draw, draw.dtype());
    const TokenPermutation got = moe_token_permute(batch.x, batch.experts, batch.cut);
    ASSERT_EQ(got.permuted_tokens.view().shape(), (Shape{batch.rows, batch.width}));
    const auto slots = sorted_slots(batch.experts);
    for (std::int64_t i = 0; i < batch.n * batch.k; ++i) {
      const std::int64_t slot = slots[at(i)].second;
      EXPECT_EQ(integer(got.sorted_indices, slot), i);
      if (i < batch.rows) {
        EXPECT_TRUE(same_row(got.permuted_tokens, i, batch.x, slot / batch.k)) << i;
      }
    }
  }
}

TEST(AscendPermutation, takes_one_expert_per_token_without_an_axis_and_rows_of_any_dtype) {
  const std::vector<std::int8_t> x{1, 2, 3};
  const std::vector<std::int64_t> experts{5, -2, 5};
  const TokenPermutation got = moe_token_permute({x.data(), {3, 1}}, {experts.data(), {3}});
  EXPECT_EQ(std::vector<int>(got.permuted_tokens.as<std::int8_t>(), got.permuted_tokens.as<std::int8_t>() + 3),
            (std::vector<int>{2, 1, 3}));
  EXPECT_EQ(moe_token_permute({x.data(), {0, 1}}, {experts.data(), {0}}).permuted_tokens.view().shape(), (Shape{0, 1}));
}

TEST(AscendPermutation, sums_the_rows_of_a_token_and_goes_back) {
  on_one_rank([](const Context& context) {
    Draw draw(2);
    for (int round = 0; round < 60; ++round) {
      const DType dtype = round % 2 == 0 ? DType::f32 : DType::bf16;
      const Batch b(draw, dtype);
      const TokenPermutation permutation = moe_token_permute(b.x, b.experts, b.cut);
      const Array rows = draw.reals(dtype, {b.rows, b.width}), probs = draw.reals(draw.dtype(), {b.n, b.k});
      const Array dout = draw.reals(dtype, {b.n, b.width});
      const Array out = moe_token_unpermute(context, rows, permutation.sorted_indices, probs);
      const Array dx = moe_token_permute_grad(context, rows, permutation.sorted_indices, b.n);
      const TokenUnpermuteGrad grad = moe_token_unpermute_grad(context, dout, rows, permutation.sorted_indices, probs);
      for (std::int64_t n = 0; n < b.n; ++n) {
        for (std::int64_t h = 0; h < b.width; ++h) {
          double sum = 0, plain = 0, size = 0;
          for (std::int64_t k = 0; k < b.k; ++k) {
            const std::int64_t row = integer(permutation.sorted_indices, n * b.k + k);
            const double weight = double{number(probs, n * b.k + k)};
            const double value = row < b.rows ? double{number(rows, row * b.width + h)} : 0;
            sum += weight * value;
            plain += value;
            size += std::abs(weight * value) + std::abs(value);
            if (row >= b.rows) continue;
            EXPECT_NEAR(double{number(grad.permuted_tokens_grad, row * b.width + h)},
                        weight * double{number(dout, n * b.width + h)}, 8 * relative(dtype));
          }
          EXPECT_NEAR(double{number(out, n * b.width + h)}, sum, size * relative(dtype) + 1e-6);
          EXPECT_NEAR(double{number(dx, n * b.width + h)}, plain, size * relative(dtype) + 1e-6);
        }
        for (std::int64_t k = 0; k < b.k; ++k) {
          const std::int64_t row = integer(permutation.sorted_indices, n * b.k + k);
          double dot = 0, size = 0;
          for (std::int64_t h = 0; h < b.width && row < b.rows; ++h) {
            const double term = double{number(dout, n * b.width + h)} * double{number(rows, row * b.width + h)};
            dot += term;
            size += std::abs(term);
          }
          EXPECT_NEAR(double{number(grad.probs_grad, n * b.k + k)}, dot,
                      size * relative(ConstTensor(probs).dtype()) + 1e-6);
        }
      }
    }
  });
}

TEST(AscendPermutation, gives_back_the_tokens_that_it_permuted) {
  on_one_rank([](const Context& context) {
    Draw draw(3);
    const Array x = draw.reals(DType::bf16, {9, 5}), experts = draw.integers(DType::int32, {9}, 0, 3);
    const TokenPermutation there = moe_token_permute(x, experts);
    const Array back = moe_token_unpermute(context, there.permuted_tokens, there.sorted_indices);
    for (std::int64_t n = 0; n < 9; ++n) EXPECT_TRUE(same_row(back, n, x, n));
    const TokenUnpermuteGrad grad = moe_token_unpermute_grad(context, x, there.permuted_tokens, there.sorted_indices);
    EXPECT_FALSE(grad.probs_grad);
    for (std::int64_t n = 0; n < 9; ++n) {
      EXPECT_TRUE(same_row(grad.permuted_tokens_grad, integer(there.sorted_indices, n), x, n));
    }
  });
}

TEST(AscendPermutation, brings_the_rows_of_ranks_to_their_experts) {
  Draw draw(4);
  for (int round = 0; round < 30; ++round) {
    const std::int64_t ranks = draw.number(1, 6), experts = draw.number(1, 6), width = draw.number(1, 9);
    const Array counts = draw.integers(round % 2 == 0 ? DType::int32 : DType::int64, {ranks, experts}, 0, 4);
    struct Row {
      std::int64_t expert, rank, place;
      bool operator<(const Row& other) const {
        return std::tie(expert, rank, place) < std::tie(other.expert, other.rank, other.place);
      }
    };
    std::vector<Row> rows;
    for (std::int64_t i = 0; i < ranks * experts; ++i) {
      for (std::int64_t j = 0; j < integer(counts, i); ++j) {
        rows.push_back({i % experts, i / experts, static_cast<std::int64_t>(rows.size())});
      }
    }
    const auto total = static_cast<std::int64_t>(rows.size());
    const Array tokens = draw.reals(draw.dtype(), {total, width}), scales = draw.reals(DType::f32, {total});
    const ReRouting got = moe_re_routing(tokens, counts, {.per_token_scales = scales});
    const ReRouting other = moe_re_routing(tokens, counts, {.expert_token_num_type = 0, .idx_type = 1});
    EXPECT_FALSE(other.permute_per_token_scales);
    std::sort(rows.begin(), rows.end());
    for (std::int64_t i = 0; i < total; ++i) {
      const std::int64_t from = rows[at(i)].place;
      EXPECT_TRUE(same_row(got.permute_tokens, i, tokens, from));
      EXPECT_EQ(got.permute_per_token_scales.as<float>()[i], scales.as<float>()[from]);
      EXPECT_EQ(integer(got.permute_token_idx, i), from);
      EXPECT_EQ(integer(other.permute_token_idx, from), i);
    }
    for (std::int64_t e = 0, before = 0; e < experts; ++e) {
      const auto count = std::count_if(rows.begin(), rows.end(), [&](const Row& row) { return row.expert == e; });
      EXPECT_EQ(integer(got.expert_token_num, e), count);
      EXPECT_EQ(integer(other.expert_token_num, e), before += count);
    }
  }
}

TEST(AscendPermutation, finalizes_what_experts_give_with_all_that_is_added) {
  on_one_rank([](const Context& context) {
    Draw draw(5);
    for (int round = 0; round < 80; ++round) {
      const std::int64_t mode = draw.number(0, 3), n = draw.number(0, 40), width = draw.number(1, 20);
      const bool is_scaled = draw.number(0, 2) > 0, drops = mode % 2 == 1;
      const std::int64_t k = is_scaled ? draw.number(1, 4) : 1, experts = draw.number(1, 5),
                         capacity = draw.number(1, 9);
      const DType dtype = draw.dtype();
      const Array rows = drops ? draw.reals(dtype, {experts, capacity, width}) : draw.reals(dtype, {n * k, width});
      const std::int64_t count = drops ? experts * capacity : n * k;
      const Array places = draw.integers(DType::int32, {n * k}, drops ? -1 : 0, count - 1);
      const Array scales = draw.reals(draw.dtype(), {n, k}), bias = draw.reals(dtype, {experts, width});
      const Array ids = draw.integers(DType::int32, {n, k}, 0, experts - 1);
      const Array skip1 = draw.reals(dtype, {n, width}), skip2 = draw.reals(dtype, {n, width});
      FinalizeRoutingInputs inputs{
          .expanded_permuted_rows = rows, .expanded_src_to_dst_row = places, .drop_pad_mode = mode};
      if (is_scaled) inputs.scales = scales;
      const std::int64_t skips = draw.number(0, 2);
      if (skips > 0) inputs.skip1 = skip1;
      if (skips > 1) inputs.skip2 = skip2;
      const bool is_biased = draw.number(0, 1) == 1;
      if (is_biased) {
        inputs.bias = bias;
        inputs.expert_for_source_row = ids;
      }
      const Array out = moe_finalize_routing(context, inputs);
      for (std::int64_t t = 0; t < n; ++t) {
        for (std::int64_t h = 0; h < width; ++h) {
          double sum = skips > 0 ? double{number(skip1, t * width + h)} : 0;
          if (skips > 1) sum += double{number(skip2, t * width + h)};
          double size = std::abs(sum) + 1;
          for (std::int64_t j = 0; j < k; ++j) {
            const std::int64_t row = integer(places, mode < 2 ? j * n + t : t * k + j);
            if (row < 0) continue;
            double value = double{number(rows, row * width + h)};
            if (is_biased) value += double{number(bias, integer(ids, t * k + j) * width + h)};
            if (is_scaled) value *= double{number(scales, t * k + j)};
            sum += value;
            size += std::abs(value);
          }
          EXPECT_NEAR(double{number(out, t * width + h)}, sum, size * relative(dtype)) << "mode " << mode;
        }
      }
    }
  });
}

TEST(AscendPermutation, counts_the_rows_up_to_each_expert) {
  const std::vector<std::int32_t> experts{0, 0, 2, 2, 2, 4};
  const Array sums = moe_compute_expert_tokens({experts.data(), {6}}, 6);
  EXPECT_EQ(std::vector<int>(sums.as<std::int32_t>(), sums.as<std::int32_t>() + 6),
            (std::vector<int>{2, 2, 5, 5, 6, 6}));
}

TEST(AscendPermutation, counts_experts_beyond_the_last_nowhere) {
  const std::vector<std::int32_t> experts{3, 3, 4, 5, 6, 7};
  const Array sums = moe_compute_expert_tokens({experts.data(), {6}}, 5);
  const auto* const from = sums.as<std::int32_t>();
  EXPECT_EQ(std::vector<std::int32_t>(from, from + 5), (std::vector<std::int32_t>{0, 0, 0, 2, 3}));
}

TEST(AscendPermutation, takes_the_rows_of_another_routing) {
  on_one_rank([](const Context& context) {
    // Of four slots two have rows; the others name a row there already, and one beyond the last.
    const std::vector<float> rows{1, 2, 10, 20}, weights{1, 0, 0.5F, 1};
    const std::vector<std::int32_t> places{1, 1, 0, 3};
    const Array out =
        moe_token_unpermute(context, ConstTensor(rows.data(), Shape{2, 2}), ConstTensor(places.data(), Shape{4}),
                            ConstTensor(weights.data(), Shape{2, 2}));
    const auto* const sums = out.as<float>();
    EXPECT_EQ(std::vector<float>(sums, sums + 4), (std::vector<float>{10, 20, 0.5F, 1}));
    // Slot (n, k) is the (k N + n)th: the first token has row 1 and none, the second row 0 and none.
    const std::vector<std::int32_t> columns{1, 0, -1, 3};
    const Array final_rows =
        moe_finalize_routing(context, {.expanded_permuted_rows = ConstTensor(rows.data(), Shape{2, 2}),
                                       .scales = ConstTensor(weights.data(), Shape{2, 2}),
                                       .expanded_src_to_dst_row = ConstTensor(columns.data(), Shape{4})});
    const auto* const finals = final_rows.as<float>();
    EXPECT_EQ(std::vector<float>(finals, finals + 4), (std::vector<float>{10, 20, 0.5F, 1}));
  });
}

TEST(AscendPermutation, refuses_what_does_not_fit) {
  on_one_rank([](const Context& context) {
    const Array x(DType::f32, {4, 3}), half(DType::f16, {4, 3}), flat(DType::f32, {12}), ids(DType::int32, {2, 2});
    const Array real_ids(DType::f32, {4}), probs(DType::f32, {2, 2}), counts(DType::int32, {2, 2});
    const std::vector<std::int32_t> order{3, 1, 2, 0}, twice{3, 1, 1, 0}, far{3, 1, 2, 4}, falling{0, 2, 1};
    const ConstTensor good(order.data(), {4});
    const auto refusal = [](const std::function<void()>& call) { return test::refusal_of(call); };
    EXPECT_EQ(refusal([&] { moe_token_permute(flat, ids); }), "tokens is f32 [12], should have 2 axes");
    EXPECT_EQ(refusal([&] { moe_token_permute(x, real_ids); }), "indices is f32 [4], should be int32 or int64");
    EXPECT_EQ(refusal([&] { moe_token_permute(x, ids); }),
              "indices is int32 [2, 2], should have a row for each of the 4 tokens");
    EXPECT_EQ(refusal([&] { moe_token_unpermute(context, half, good); }),
              "permuted_tokens is f16, neither f32 nor bf16");
    EXPECT_EQ(refusal([&] {
                moe_token_permute_grad(context, x, {twice.data(), {4}}, 4);
              }),
              "sorted_indices[2] is 1, which is there already");
    EXPECT_EQ(refusal([&] {
                moe_token_unpermute(context, x, {far.data(), {4}});
              }),
              "sorted_indices[3] is 4, should be from 0 to 3");
    EXPECT_EQ(refusal([&] {
                moe_token_unpermute(context, x, {order.data(), {2}}, probs);
              }),
              "probs is f32 [2, 2], should have the 2 elements of sorted_indices");
    EXPECT_EQ(refusal([&] {
                moe_token_permute_grad(context, x, {order.data(), {2}}, 2);
              }),
              "the rows of permuted_tokens is 4, should be from 0 to 2");
    EXPECT_EQ(refusal([&] { moe_token_permute_grad(context, x, good, 3); }),
              "sorted_indices has 4 elements, no multiple of the 3 tokens");
    EXPECT_EQ(refusal([&] { moe_token_unpermute_grad(context, half, x, good); }),
              "unpermuted_tokens_grad is f16 [4, 3], should be f32 [4, 3]");
    EXPECT_EQ(refusal([&] { moe_re_routing(x, counts); }),
              "tokens is f32 [4, 3], should have the 0 rows that expert_token_num_per_rank counts");
    EXPECT_EQ(refusal([&] { moe_re_routing(x, counts, {.expert_token_num_type = 2}); }),
              "expert_token_num_type is 2, should be from 0 to 1");
    EXPECT_EQ(refusal([&] { moe_re_routing(x, counts, {.idx_type = -1}); }), "idx_type is -1, should be from 0 to 1");
    counts.as<std::int32_t>()[2] = 4;
    EXPECT_EQ(refusal([&] { moe_re_routing(x, counts, {.per_token_scales = probs}); }),
              "per_token_scales is f32 [2, 2], should have a row for each of the 4 tokens");
    counts.as<std::int32_t>()[3] = -1;
    EXPECT_EQ(refusal([&] { moe_re_routing(x, counts); }),
              "expert_token_num_per_rank[1,1] is -1, should be from 0 to 2147483647");
    EXPECT_EQ(refusal([&] {
                moe_compute_expert_tokens({falling.data(), {3}}, 3);
              }),
              "sorted_expert_for_source_row[2] is 1, should be from 2 to 2147483647");
    EXPECT_EQ(refusal([&] {
                moe_compute_expert_tokens({falling.data(), {3}}, 0);
              }),
              "num_expert is 0, should be from 1 to 2147483647");
  });
}

TEST(AscendPermutation, refuses_to_finalize_what_does_not_fit) {
  on_one_rank([](const Context& context) {
    const Array rows(DType::f32, {4, 3}), cube(DType::f32, {2, 2, 3}), places(DType::int32, {4}),
        skip(DType::f32, {2, 3});
    const Array scales(DType::f32, {2, 2}), bias(DType::f32, {5, 3}), ids(DType::int32, {2, 2}),
        wrong(DType::bf16, {2, 3});
    const FinalizeRoutingInputs good{
        .expanded_permuted_rows = rows, .scales = scales, .expanded_src_to_dst_row = places};
    const auto refusal = [&](const std::function<void(FinalizeRoutingInputs&)>& change) {
      FinalizeRoutingInputs inputs = good;
      change(inputs);
      return test::refusal_of([&] { moe_finalize_routing(context, inputs); });
    };
    using I = FinalizeRoutingInputs;
    EXPECT_EQ(refusal([](I& i) { i.drop_pad_mode = 4; }), "drop_pad_mode is 4, should be from 0 to 3");
    EXPECT_EQ(refusal([](I& i) { i.drop_pad_mode = 1; }), "expanded_permuted_rows is f32 [4, 3], should have 3 axes");
    EXPECT_EQ(refusal([&](I& i) { i.expanded_permuted_rows = ids; }),
              "expanded_permuted_rows is int32 [2, 2], should be f32, bf16 or f16");
    EXPECT_EQ(refusal([&](I& i) { i.expanded_src_to_dst_row = scales; }),
              "expanded_src_to_dst_row is f32 [2, 2], should have 1 axis");
    EXPECT_EQ(refusal([&](I& i) { i.scales = skip; }),
              "scales is f32 [2, 3], should have the 4 elements of expanded_src_to_dst_row");
    EXPECT_EQ(refusal([&](I& i) { i.skip1 = wrong; }), "skip1 is bf16 [2, 3], should be f32 [2, 3]");
    EXPECT_EQ(refusal([&](I& i) { i.skip2 = skip; }), "skip2 is given without skip1");
    EXPECT_EQ(refusal([&](I& i) { i.bias = bias; }), "bias is given without expert_for_source_row");
    ids.as<std::int32_t>()[3] = 5;
    EXPECT_EQ(refusal([&](I& i) { i.bias = bias, i.expert_for_source_row = ids; }),
              "expert_for_source_row[1,1] is 5, should be from 0 to 4");
    places.as<std::int32_t>()[1] = -1;
    EXPECT_EQ(refusal([](I& i) { i.drop_pad_mode = 4; }), "drop_pad_mode is 4, should be from 0 to 3");
    places.as<std::int32_t>()[1] = -2;
    EXPECT_EQ(refusal([](I&) {}), "expanded_src_to_dst_row[1] is -2, should be from -1 to 2147483647");
    places.as<std::int32_t>()[1] = 4;
    EXPECT_EQ(refusal([&](I& i) { i.expanded_permuted_rows = cube, i.drop_pad_mode = 3; }),
              "expanded_src_to_dst_row[1] is 4, should be from -1 to 3");
  });
}

}  // namespace
}  // namespace expar::ascend
