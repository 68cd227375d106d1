// Rows for the experts' kernels, slot by slot as the operators describe them, and back by moe_finalize_routing.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <expar/ascend/gating.h>
#include <expar/ascend/init_routing.h>
#include <expar/ascend/permutation.h>

#include "tests/error_of.h"
#include "tests/unit/ascend_testing.h"

namespace expar::ascend {
namespace {

/// Slots whose experts lie in [first, end), by expert and then by slot.
std::vector<std::int64_t> slots_of_experts(const ConstTensor& experts, std::int64_t first, std::int64_t end) {
  std::vector<std::int64_t> slots;
  for (std::int64_t e = first; e < end; ++e) {
    for (std::int64_t i = 0; i < experts.elements(); ++i) {
      if (integer(experts, i) == e) slots.push_back(i);
    }
  }
  return slots;
}

std::vector<std::int64_t> ints(const Array& array) {
  std::vector<std::int64_t> all;
  for (std::int64_t i = 0; array && i < array.view().elements(); ++i) all.push_back(integer(array, i));
  return all;
}

bool same_row(const ConstTensor& a, std::int64_t i, const ConstTensor& b, std::int64_t j) {
  return std::memcmp(a.rows(i, 1).data(), b.rows(j, 1).data(), b.rows(j, 1).byte_size()) == 0;
}

bool is_zero(const ConstTensor& tensor, std::int64_t i, std::int64_t bytes) {
  const std::byte* const row = tensor.bytes() + i * bytes;
  return std::all_of(row, row + bytes, [](std::byte b) { return b == std::byte{0}; });
}

TEST(AscendInitRouting, sorts_the_slots_that_gating_chose) {
  on_one_rank([](const Context& context) {
    Draw draw(1);
    for (int round = 0; round < 40; ++round) {
      const std::int64_t n = draw.number(0, 20), k = draw.number(1, 4), width = draw.number(1, 12);
      const std::int64_t active = draw.number(0, n + 2), kept = std::min(active, n) * k;
      const Array x = draw.reals(draw.dtype(), {n, width}), logits = draw.reals(DType::f32, {n, 6});
      const SoftmaxGating gating = moe_gating_top_k_softmax(context, logits, {}, k);
      const InitRouting got = moe_init_routing(x, gating.row_idx, gating.expert_idx, active);
      ASSERT_EQ(got.expanded_x.view().shape(), (Shape{kept, width}));
      const std::vector<std::int64_t> slots = slots_of_experts(gating.expert_idx, 0, 6);
      for (std::int64_t i = 0; i < n * k; ++i) {
        const std::int64_t slot = slots[at(i)];
        EXPECT_EQ(integer(got.expanded_row_idx, slot % k * n + slot / k), i);
        EXPECT_EQ(integer(got.expanded_expert_idx, i), integer(gating.expert_idx, slot));
        if (i < kept) {
          EXPECT_TRUE(same_row(got.expanded_x, i, x, slot / k));
        }
      }
    }
  });
}

TEST(AscendInitRouting, gives_what_can_be_worked_out_by_hand) {
  on_one_rank([](const Context& context) {
    const std::vector<float> x{10, 20, 30};
    const std::vector<std::int32_t> experts{2, 0, 1, 2, 2, 5};
    const ConstTensor rows(x.data(), {3, 1}), ids(experts.data(), {3, 2});
    using Ints = std::vector<std::int64_t>;
    InitRoutingOptions options{.expert_num = 6, .expert_tokens_num_flag = true};
    const InitRoutingV2 all = moe_init_routing_v2(context, rows, ids, options);
    EXPECT_EQ(ints(all.expanded_row_idx), (Ints{2, 0, 1, 3, 4, 5}));
    EXPECT_EQ(ints(all.expert_token_cumsum_or_count), (Ints{1, 2, 5, 5, 5, 6}));
    options.active_expert_range = {1, 3};
    options.row_idx_type = 1;
    options.expert_tokens_num_type = 2;
    const InitRoutingV2 range = moe_init_routing_v2(context, rows, ids, options);
    EXPECT_EQ(ints(range.expanded_row_idx), (Ints{2, 0, 3, 4, 1, 5}));
    EXPECT_EQ(ints(range.expert_token_cumsum_or_count), (Ints{1, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0}));
    EXPECT_EQ(number(range.expanded_x, 0), 20);
    EXPECT_EQ(number(range.expanded_x, 3), 30);
    EXPECT_EQ(number(range.expanded_x, 4), 0);
    const InitRoutingV2 padded = moe_init_routing_v2(context, rows, ids,
                                                     {.expert_capacity = 2,
                                                      .expert_num = 6,
                                                      .drop_pad_mode = 1,
                                                      .expert_tokens_num_type = 1,
                                                      .expert_tokens_num_flag = true});
    EXPECT_EQ(ints(padded.expanded_row_idx), (Ints{4, 0, 2, 5, -1, 10}));
    EXPECT_EQ(ints(padded.expert_token_cumsum_or_count), (Ints{1, 1, 3, 0, 0, 1}));
    EXPECT_EQ(padded.expanded_x.view().shape(), (Shape{6, 2, 1}));
    EXPECT_EQ(number(padded.expanded_x, 5), 20);
  });
}

/// Options at random, and what they are about.
struct Case {
  explicit Case(Draw& draw)
      : n(draw.number(1, 24)),
        k(draw.number(1, 4)),
        width(draw.number(1, 100)),
        experts(draw.number(1, 9)),
        x(draw.reals(draw.dtype(), {n, width})),
        ids(draw.integers(DType::int32, {n, k}, -1, experts)) {
    options.expert_num = experts;
    options.expert_tokens_num_type = draw.number(0, 2);
    options.expert_tokens_num_flag = draw.number(0, 3) > 0;
    options.drop_pad_mode = draw.number(0, 1);
    if (options.drop_pad_mode == 1) {
      options.expert_capacity = draw.number(1, n);
      return;
    }
    options.active_num = draw.number(-1, n * k + 2);
    options.row_idx_type = draw.number(0, 1);
    if (draw.number(0, 1) == 0) return;
    first = draw.number(0, experts - 1);
    end = draw.number(first + 1, experts);
    options.active_expert_range = {first, end};
  }

  std::int64_t places() const {
    if (options.drop_pad_mode == 1) return experts * options.expert_capacity;
    return options.active_num > 0 ? std::min(options.active_num, n * k) : n * k;
  }
  /// The slot of each place, -1 where there is none.
  std::vector<std::int64_t> slots() const {
    std::vector<std::int64_t> all(at(places()), -1);
    for (std::int64_t e = 0; e < experts && options.drop_pad_mode == 1; ++e) {
      const auto mine = slots_of_experts(ids, e, e + 1);
      const auto kept = std::min<std::int64_t>(options.expert_capacity, static_cast<std::int64_t>(mine.size()));
      std::copy_n(mine.begin(), kept, all.begin() + e * options.expert_capacity);
    }
    if (options.drop_pad_mode == 0) {
      const auto active = slots_of_experts(ids, first, end < 0 ? experts : end);
      std::copy_n(active.begin(), std::min(active.size(), all.size()), all.begin());
    }
    return all;
  }

  std::int64_t n, k, width, experts, first = 0, end = -1;
  Array x, ids;
  InitRoutingOptions options;
};

TEST(AscendInitRouting, puts_every_slot_where_its_options_say) {
  on_one_rank([](const Context& context) {
    Draw draw(2);
    for (int round = 0; round < 150; ++round) {
      Case c(draw);
      const Array scale = draw.reals(DType::f32, {c.n});
      const bool is_scaled = draw.number(0, 1) == 1;
      if (is_scaled) c.options.scale = scale;
      const InitRoutingV2 got = moe_init_routing_v2(context, c.x, c.ids, c.options);
      const std::vector<std::int64_t> slots = c.slots();
      const Tensor x = got.expanded_x;
      const ConstTensor flat(x.data(), x.dtype(), {c.places(), c.width});
      EXPECT_EQ(static_cast<bool>(got.expanded_scale), is_scaled);
      for (std::int64_t i = 0; i < c.places(); ++i) {
        const std::int64_t slot = slots[at(i)];
        if (slot < 0) {
          EXPECT_TRUE(is_zero(x, i, c.width * static_cast<std::int64_t>(size_of(x.dtype()))));
          continue;
        }
        EXPECT_TRUE(same_row(flat, i, c.x, slot / c.k));
        if (is_scaled) {
          EXPECT_EQ(number(got.expanded_scale, i), number(scale, slot / c.k));
        }
      }
      const std::int64_t end = c.end < 0 ? c.experts : c.end;
      const auto active = slots_of_experts(c.ids, c.first, end);
      std::vector<std::int64_t> wanted(at(c.n * c.k), -1);
      if (c.options.row_idx_type == 1) {
        wanted = active;
        for (std::int64_t i = 0; i < c.n * c.k; ++i) {
          if (std::find(active.begin(), active.end(), i) == active.end()) wanted.push_back(i);
        }
      } else if (c.options.drop_pad_mode == 0) {
        for (std::size_t i = 0; i < active.size(); ++i) wanted[at(active[i])] = static_cast<std::int64_t>(i);
      } else {
        for (std::size_t i = 0; i < slots.size(); ++i) {
          if (slots[i] >= 0) wanted[at(slots[i])] = static_cast<std::int64_t>(i);
        }
      }
      EXPECT_EQ(ints(got.expanded_row_idx), wanted);
      std::vector<std::int64_t> counts;
      std::int64_t sum = 0;
      for (std::int64_t e = c.first; e < end && c.options.expert_tokens_num_flag; ++e) {
        const auto count = static_cast<std::int64_t>(slots_of_experts(c.ids, e, e + 1).size());
        sum += count;
        if (c.options.expert_tokens_num_type < 2) {
          counts.push_back(c.options.expert_tokens_num_type == 0 ? sum : count);
        } else if (count > 0) {
          counts.push_back(e);
          counts.push_back(count);
        }
      }
      if (c.options.expert_tokens_num_flag && c.options.expert_tokens_num_type == 2) counts.resize(at(2 * c.experts));
      EXPECT_EQ(ints(got.expert_token_cumsum_or_count), counts);
    }
  });
}

double code_value(DType dtype, const Tensor& x, std::int64_t i) {
  if (dtype == DType::int8) return x.as<std::int8_t>()[i];
  return dtype == DType::fp8_e4m3 ? static_cast<double>(static_cast<float>(x.as<fp8_e4m3>()[i]))
                                  : static_cast<double>(static_cast<float>(x.as<fp8_e5m2>()[i]));
}

TEST(AscendInitRouting, quantises_rows_within_half_a_step) {
  on_one_rank([](const Context& context) {
    Draw draw(3);
    for (int round = 0; round < 80; ++round) {
      Case c(draw);
      c.options.quant_mode = round % 4;
      const std::int64_t range = (c.end < 0 ? c.experts : c.end) - c.first;
      const std::int64_t smooth_rows = draw.number(0, 2) == 0 ? 1 : range;
      const Array offset = draw.reals(DType::f32, {1}), one = draw.reals(DType::f32, {1});
      const Array smooth = draw.reals(DType::f32, {smooth_rows, c.width});
      const bool is_smooth = c.options.quant_mode == 1 && draw.number(0, 1) == 1;
      if (c.options.quant_mode == 0) c.options.scale = one, c.options.offset = offset;
      if (is_smooth) c.options.scale = smooth;
      const InitRoutingV2 got = moe_init_routing_v2(context, c.x, c.ids, c.options);
      const DType dtype = c.options.quant_mode < 2    ? DType::int8
                          : c.options.quant_mode == 2 ? DType::fp8_e5m2
                                                      : DType::fp8_e4m3;
      const Tensor x = got.expanded_x;
      ASSERT_EQ(x.dtype(), dtype);
      const std::int64_t scales = (((c.width + 31) / 32) + 1) / 2 * 2;
      if (c.options.quant_mode >= 2) {
        ASSERT_EQ(got.expanded_scale.view().shape(), (Shape{c.places(), scales}));
      }
      const std::vector<std::int64_t> slots = c.slots();
      for (std::int64_t i = 0; i < c.places() * c.width; ++i) {
        const std::int64_t slot = slots[at(i / c.width)], h = i % c.width;
        if (slot < 0) {
          EXPECT_EQ(code_value(dtype, x, i), 0);
          continue;
        }
        const double value = double{number(c.x, slot / c.k * c.width + h)}, q = code_value(dtype, x, i);
        if (c.options.quant_mode == 0) {
          const double wanted = value * double{number(one, 0)} + double{number(offset, 0)};
          EXPECT_LE(std::abs(q - std::clamp(wanted, -128.0, 127.0)), 0.5001);
        } else if (c.options.quant_mode == 1) {
          const std::int64_t expert = integer(c.ids, slot) - c.first;
          const double factor = is_smooth ? double{number(smooth, (smooth_rows == 1 ? 0 : expert) * c.width + h)} : 1;
          const double scale = double{number(got.expanded_scale, i / c.width)};
          EXPECT_LE(std::abs(q * scale - value * factor), 0.5001 * scale);
        } else {
          const double scale =
              static_cast<double>(static_cast<float>(got.expanded_scale.as<fp8_e8m0>()[i / c.width * scales + h / 32]));
          EXPECT_LE(std::abs(q * scale - value), std::abs(value) * 0.126 + scale * 0x1p-9) << "value " << value;
        }
      }
    }
  });
}

TEST(AscendInitRouting, comes_back_by_moe_finalize_routing) {
  on_one_rank([](const Context& context) {
    Draw draw(4);
    for (const std::int64_t mode : {0, 2, 3}) {
      const Array x = draw.reals(DType::f32, {20, 7}), logits = draw.reals(DType::f32, {20, 8});
      const SoftmaxGating gating = moe_gating_top_k_softmax(context, logits, {}, 3);
      const Array *rows = nullptr, *places = nullptr;
      InitRouting first;
      InitRoutingV2 second;
      if (mode == 0) {
        first = moe_init_routing(x, gating.row_idx, gating.expert_idx, 20);
        rows = &first.expanded_x, places = &first.expanded_row_idx;
      } else {
        second = moe_init_routing_v2(context, x, gating.expert_idx,
                                     {.expert_capacity = 5, .expert_num = 8, .drop_pad_mode = mode == 3 ? 1 : 0});
        rows = &second.expanded_x, places = &second.expanded_row_idx;
      }
      const Array out = moe_finalize_routing(context, {.expanded_permuted_rows = *rows,
                                                       .scales = gating.y,
                                                       .expanded_src_to_dst_row = *places,
                                                       .drop_pad_mode = mode});
      std::vector<std::int64_t> taken(8);
      std::vector<double> kept(20);
      for (const std::int64_t slot : slots_of_experts(gating.expert_idx, 0, 8)) {
        const bool has_room = taken[at(integer(gating.expert_idx, slot))]++ < 5;
        if (mode != 3 || has_room) kept[at(slot / 3)] += double{number(gating.y, slot)};
      }
      for (std::int64_t i = 0; i < 140; ++i) {
        EXPECT_NEAR(double{number(out, i)}, kept[at(i / 7)] * double{number(x, i)}, 1e-5) << "mode " << mode;
      }
    }
  });
}

TEST(AscendInitRouting, refuses_what_is_out_of_its_range) {
  on_one_rank([](const Context& context) {
    const Array x(DType::f32, {3, 4}), ids(DType::int32, {3, 2}), short_ids(DType::int32, {2, 2}), one(DType::f32, {1});
    const Array bytes(DType::int8, {3, 4}), places(DType::int32, {3, 2}), scales(DType::f32, {2, 4});
    const auto refusal = [&](const InitRoutingOptions& options, const Array& rows) {
      return test::refusal_of([&] { moe_init_routing_v2(context, rows, ids, options); });
    };
    EXPECT_EQ(refusal({}, x), "expert_num is -1, should be from 1 to 2147483647");
    EXPECT_EQ(refusal({.active_num = -2, .expert_num = 4}, x),
              "active_num is -2, should be from -1 to 9223372036854775807");
    EXPECT_EQ(refusal({.expert_num = 4, .drop_pad_mode = 2}, x), "drop_pad_mode is 2, should be from 0 to 1");
    EXPECT_EQ(refusal({.expert_num = 4, .drop_pad_mode = 1}, x), "expert_capacity is -1, should be from 1 to 3");
    EXPECT_EQ(refusal({.expert_capacity = 4, .expert_num = 4, .drop_pad_mode = 1}, x),
              "expert_capacity is 4, should be from 1 to 3");
    EXPECT_EQ(refusal({.expert_capacity = 3, .expert_num = 4, .drop_pad_mode = 1, .row_idx_type = 1}, x),
              "row_idx_type is 1, should be 0 with drop_pad_mode 1");
    EXPECT_EQ(refusal({.expert_capacity = 3, .expert_num = 4, .drop_pad_mode = 1, .active_expert_range = {{0, 3}}}, x),
              "active_expert_range is not all experts, as drop_pad_mode 1 needs");
    EXPECT_EQ(refusal({.expert_num = 4, .expert_tokens_num_type = 3}, x),
              "expert_tokens_num_type is 3, should be from 0 to 2");
    EXPECT_EQ(refusal({.expert_num = 4, .quant_mode = 4}, x), "quant_mode is 4, should be from -1 to 3");
    EXPECT_EQ(refusal({.expert_num = 4, .active_expert_range = {{4, 5}}}, x),
              "active_expert_range[0] is 4, should be from 0 to 3");
    EXPECT_EQ(refusal({.expert_num = 4, .active_expert_range = {{2, 2}}}, x),
              "active_expert_range[1] is 2, should be from 3 to 4");
    EXPECT_EQ(refusal({.expert_num = 4, .row_idx_type = 2}, x), "row_idx_type is 2, should be from 0 to 1");
    EXPECT_EQ(refusal({.offset = one, .expert_num = 4}, x), "offset is given without quant_mode 0");
    EXPECT_EQ(refusal({.scale = one, .expert_num = 4}, x), "scale is f32 [1], should be f32 [3]");
    EXPECT_EQ(refusal({.scale = one, .expert_num = 4, .quant_mode = 0}, x), "offset is f32 [], should be f32 [1]");
    EXPECT_EQ(refusal({.scale = scales, .expert_num = 4, .quant_mode = 1}, x),
              "scale is f32 [2, 4], should be f32 [4, 4]");
    EXPECT_EQ(refusal({.scale = one, .expert_num = 4, .quant_mode = 3}, x),
              "scale is given with quant_mode 3, which takes none");
    EXPECT_EQ(refusal({.expert_num = 4, .quant_mode = 1}, bytes), "x is int8 [3, 4], should be f32, bf16 or f16");
    EXPECT_EQ(test::refusal_of([&] { moe_init_routing_v2(context, x, short_ids, {.expert_num = 4}); }),
              "expert_idx is int32 [2, 2], should be int32 [3, 2]");
    EXPECT_EQ(test::refusal_of([&] { moe_init_routing(x, places, ids, 3); }), "row_idx[0,1] is 0, should be 3");
    EXPECT_EQ(test::refusal_of([&] { moe_init_routing(x, places, ids, -1); }),
              "active_num is -1, should be from 0 to 9223372036854775807");
  });
}

}  // namespace
}  // namespace expar::ascend
