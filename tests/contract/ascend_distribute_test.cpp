// The split-phase operators of npu_moe_distribute, against plain loops over all ranks' tokens.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <latch>
#include <thread>

#include <expar/collectives.h>
#include <expar/registry.h>

#include "src/util/check.h"
#include "tests/contract/ascend_rank.h"
#include "tests/contract/share.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

using ascend::Domain;

class Distribute : public EveryWay {};

TEST_P(Distribute, puts_every_row_where_its_address_says) {
  run(GetParam(), [](const Context& context) {
    if (context.size() < 2) return;  // the pages' least
    for (std::uint64_t seed = 1; seed <= 4; ++seed) {
      const Batch batch = random_batch(context.size(), seed);
      const AscendRank rank(
          context, batch,
          {.dtype = seed % 2 == 0 ? DType::bf16 : DType::f16, .nums_type = static_cast<std::int64_t>(seed % 2)});
      rank.dispatch_teardown(rank.dispatch_setup());
      check_dispatched(rank, batch, [&](const Copy& copy, std::int64_t row) {
        const std::vector<float> wanted = batch.x(copy.source, copy.token);
        Array as_sent(rank.modes.dtype, {batch.h});
        for (std::int64_t i = 0; i < batch.h; ++i) set_element(as_sent, i, wanted[at(i)]);
        require(std::memcmp(rank.expand_x.view().rows(row, 1).data(), as_sent.view().data(), at(2 * batch.h)) == 0,
                batch.str() + ": a row");
      });
      // A slot's row begins where its source's rows of its expert do, and is the expand_idx-th of them.
      const auto* const ordinals = rank.expand_idx.as<std::int32_t>();
      for (std::int64_t slot = 0; slot < batch.active[at(context.rank())] * batch.topk; ++slot)
        require(ordinals[slot] == std::count(rank.ids.begin(), rank.ids.begin() + slot, rank.ids[at(slot)]),
                batch.str() + ": expand_idx");
    }
  });
}

TEST_P(Distribute, brings_back_the_weighted_sum_then_the_shared_experts) {
  run(GetParam(), [](const Context& context) {
    if (context.size() < 2) return;
    for (std::uint64_t seed = 11; seed <= 14; ++seed) {
      const Batch batch = random_batch(context.size(), seed);
      const AscendRank rank(
          context, batch,
          {.dtype = seed % 2 == 0 ? DType::bf16 : DType::f16, .comm_quant_mode = seed % 3 == 0 ? 2 : 0});
      rank.dispatch_teardown(rank.dispatch_setup());
      // Expert e multiplies by e + 1, shared expert j by 100 + j.
      const std::int64_t per_rank = rank.domain.local_expert_num(context.rank());
      std::int64_t row = 0, e = 0;
      for (const auto& of_expert : copies_for(batch, context.rank())) {
        const float factor = rank.domain.holds_shared(context.rank())
                                 ? 100.0F + static_cast<float>(context.rank() / rank.domain.ranks_per_shared_expert())
                                 : static_cast<float>((context.rank() - batch.shared_ranks) * per_rank + e++ + 1);
        for (std::size_t n = 0; n < of_expert.size(); ++n, ++row) {
          for (std::int64_t i = 0; i < batch.h; ++i)
            set_element(rank.results, row * batch.h + i, factor * element(rank.expand_x, row * batch.h + i));
        }
      }
      const Array local(rank.modes.dtype, {rank.bs, batch.h});
      for (std::int64_t i = 0; i < rank.bs * batch.h; ++i) set_element(local, i, 0.25F * element(rank.x, i));
      rank.combine_teardown(rank.combine_setup(), batch.shared == 0 ? ConstTensor(local) : ConstTensor());
      const double half = rank.modes.dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;  // of one rounding
      for (std::int64_t t = 0; t < rank.bs; ++t) {
        for (std::int64_t i = 0; i < batch.h; ++i) {
          const double x = element(rank.x, t * batch.h + i);
          double sum = 0, sizes = 0;
          const auto add = [&](double weight, double factor) {
            sum += weight * factor * x;
            sizes += std::fabs(weight * factor);
          };
          if (t < batch.active[at(context.rank())]) {
            for (std::int64_t k = 0; k < batch.topk; ++k)
              add(batch.weight(context.rank(), t, k), rank.ids[at(t * batch.topk + k)] + 1);
            for (std::int64_t j = 0; batch.shared_ranks > 0 && j < batch.shared; ++j)
              add(1, 100 + static_cast<double>(j));
          }
          // Each result is rounded once; as int8 it is besides off by half a step of the largest of its 8 values.
          double largest = 0;
          for (std::int64_t n = i / 8 * 8; n < std::min(batch.h, i / 8 * 8 + 8); ++n)
            largest = std::max(largest, std::fabs(static_cast<double>(element(rank.x, t * batch.h + n))));
          const double step = rank.modes.comm_quant_mode == 2 ? largest * (0.5 / 127 + 4 * half) : 0;
          double bound = sizes * ((std::fabs(x) * (half + 0x1p-20)) + step);
          if (batch.shared == 0) sum += 0.25 * x;
          bound += std::fabs(sum) * half + 1e-30;
          const double got = element(rank.out, t * batch.h + i);
          require_near(got, sum, bound * 1.01,
                       [&] { return batch.str() + ": out[" + std::to_string(t) + "," + std::to_string(i) + "]"; });
        }
      }
    }
  });
}

/// By the numbers of a mode: how far a value may be from what it was, where its scale is `scale`.
double step_of(const Modes& modes, double scale, double value) {
  if (modes.y_dtype.value_or(modes.quant_mode < 3 ? DType::int8 : DType::fp8_e4m3) == DType::int8) return scale / 2;
  const double relative = modes.y_dtype == DType::fp8_e5m2 ? 0x1p-3 : 0x1p-4;
  // MX may clip what is above the largest; below 2^-6 (2^-14) of the scale steps no longer shrink.
  return std::max(std::fabs(value) * relative * (modes.quant_mode == 4 ? 2 : 1), scale * 0x1p-9);
}

TEST_P(Distribute, brings_quantised_rows_within_half_a_step) {
  run(GetParam(), [](const Context& context) {
    if (context.size() < 2) return;
    const Modes all[] = {{.quant_mode = 2},
                         {.quant_mode = 3},
                         {.quant_mode = 4},
                         {.dtype = DType::f16, .quant_mode = 2, .y_dtype = DType::fp8_e5m2},
                         {.quant_mode = 2, .y_dtype = DType::fp8_e4m3}};
    for (const Modes& modes : all) {
      const Batch batch = random_batch(context.size(), 21);
      const AscendRank rank(context, batch, modes);
      const std::int64_t rows = (batch.shared_ranks == 0 ? 0 : batch.shared) + batch.experts;
      const Array smooth(DType::f32, {rows, batch.h});
      const Random random(3, "smooth");
      for (std::int64_t i = 0; i < rows * batch.h; ++i)
        smooth.as<float>()[i] = 0.5F + random.uniform(static_cast<std::uint64_t>(i));
      rank.dispatch_teardown(rank.dispatch_setup(smooth));
      const std::int64_t group = modes.quant_mode == 2 ? batch.h : modes.quant_mode == 3 ? 128 : 32;
      const std::int64_t scales = rank.scales_out.view().elements() / rank.expand_x.view().size(0);
      check_dispatched(rank, batch, [&](const Copy& copy, std::int64_t row) {
        const std::vector<float> x = batch.x(copy.source, copy.token);
        const std::int64_t which =
            copy.k >= batch.topk ? copy.k - batch.topk
                                 : rows - batch.experts + batch.ids(copy.source)[at(copy.token * batch.topk + copy.k)];
        for (std::int64_t i = 0; i < batch.h; ++i) {
          const float sent =
              modes.dtype == DType::bf16 ? static_cast<float>(bf16(x[at(i)])) : static_cast<float>(f16(x[at(i)]));
          const double value = static_cast<double>(sent) * smooth.as<float>()[which * batch.h + i];
          const double scale = element(rank.scales_out, row * scales + i / group);
          const double got = element(rank.expand_x, row * batch.h + i) * scale;
          require_near(got, value, step_of(modes, scale, value) * 1.001,
                       [&] { return batch.str() + ": a value of mode " + std::to_string(modes.quant_mode); });
        }
      });
    }
  });
}

TEST_P(Distribute, tells_every_rank_what_one_of_them_did_wrong) {
  run(GetParam(), [](const Context& context) {
    if (context.size() < 2) return;
    const Batch batch = even_batch(context.size(), 0, 1, 2 * context.size(), 2, 3);
    const AscendRank rank(context, batch, {.quant_mode = 2});
    const auto expect = [&](const Domain& domain, std::vector<std::int32_t> ids, const std::string& message) {
      const Error error = error_of([&] {
        const ascend::DispatchSetup in{
            .x = rank.x, .expert_ids = ConstTensor(ids.data(), Shape{3, 2}), .quant_mode = 2};
        rank.dispatch_teardown(ascend::moe_distribute_dispatch_setup(context, domain, in, rank.y, rank.expand_idx));
      });
      require(error.code() == ErrorCode::bad_argument && error.rank() == 1 && error.message() == message, error.what());
    };
    Domain wrong = rank.domain;
    const auto on_rank_1 = [&](std::int64_t& value, std::int64_t other) {
      wrong = rank.domain;
      if (context.rank() == 1) value = other;
    };
    on_rank_1(wrong.moe_expert_num, 513);
    expect(wrong, rank.ids, "moe_expert_num is 513, should be from 1 to 512");
    on_rank_1(wrong.comm_type, 1);
    expect(wrong, rank.ids, "comm_type is 1, should be 0");
    on_rank_1(wrong.ep_rank_id, 0);
    expect(wrong, rank.ids, "ep_rank_id is 0, but this is rank 1 of group_ep");
    std::vector<std::int32_t> ids = rank.ids;
    if (context.rank() == 1) ids[3] = ids[2];
    expect(rank.domain, ids, "expert_ids[1] has expert " + std::to_string(batch.ids(1)[2]) + " twice");

    Modes other = rank.modes;
    if (context.rank() == 1) other.quant_mode = 1;
    const Array scale(DType::f32, {1});
    const AscendRank differs(context, batch, other);
    const Error error = error_of([&] {
      differs.dispatch_teardown(differs.dispatch_setup(context.rank() == 1 ? ConstTensor(scale) : ConstTensor()));
    });
    require(error.code() == ErrorCode::mismatch && error.message().find("quant_mode") != std::string::npos,
            error.what());
    rank.dispatch_teardown(rank.dispatch_setup());  // the domain is as good as before
  });
}

TEST_P(Distribute, multiplies_by_the_scales_of_the_caller) {
  run(GetParam(), [](const Context& context) {
    if (context.size() < 2) return;
    Batch batch = even_batch(context.size(), 0, 1, context.size(), 2, 2);
    batch.global_bs = false;
    const AscendRank rank(context, batch, {.quant_mode = 1});
    // One for all; of each value; of each expert and value, the shared expert's first, though no rank holds it;
    // without.
    const Shape shapes[] = {{1}, {batch.h}, {1 + batch.experts, batch.h}, {batch.experts, batch.h}};
    for (const Shape& shape : shapes) {
      const Array scales(DType::f32, shape);
      for (std::int64_t i = 0; i < shape.elements(); ++i)
        scales.as<float>()[i] = 20 + static_cast<float>(i % 1531) / 64;
      rank.dispatch_teardown(rank.dispatch_setup(scales));
      const std::int64_t first = shape.rank() == 1 ? 0 : shape[0] - batch.experts;
      check_dispatched(rank, batch, [&](const Copy& copy, std::int64_t row) {
        const std::int64_t expert = batch.ids(copy.source)[at(copy.token * batch.topk + copy.k)];
        const std::vector<float> x = batch.x(copy.source, copy.token);
        for (std::int64_t i = 0; i < batch.h; ++i) {
          const std::int64_t which = shape.rank() == 1 ? i % shape[0] : (first + expert) * batch.h + i;
          const float product = static_cast<float>(bf16(x[at(i)])) * scales.as<float>()[which];
          const float wanted = std::clamp(std::nearbyint(product), -128.0F, 127.0F);
          require_near(element(rank.expand_x, row * batch.h + i), wanted, 0, [&] { return batch.str() + ": a value"; });
        }
      });
    }
  });
}

TEST_P(Distribute, refuses_a_teardown_that_is_not_its_setups) {
  run(GetParam(), [](const Context& context) {
    if (context.size() < 2) return;
    const Batch batch = even_batch(context.size(), 0, 1, 2 * context.size(), 2, 3);
    AscendRank rank(context, batch, {.quant_mode = 2});
    const auto expect = [&](const std::string& message) {
      const std::string says = refusal_of([&] { rank.dispatch_teardown(rank.dispatch_setup()); });
      require(says == message, says);
    };
    const auto teardown_with = [&](const auto& change, const std::string& message) {
      ascend::CommCmdInfo posted = rank.dispatch_setup();
      const Domain domain = rank.domain;
      const Modes modes = rank.modes;
      change();
      const std::string says = refusal_of([&] { rank.dispatch_teardown(std::move(posted)); });
      rank.domain = domain;
      rank.modes = modes;
      require(says == message, says);
    };
    teardown_with([&] { rank.modes.quant_mode = 3; }, "quant_mode is 3, in the setup it was 2");
    teardown_with([&] { rank.domain.ep_world_size *= 2; }, "ep_world_size is " + std::to_string(2 * batch.ranks) +
                                                               ", in the setup it was " + std::to_string(batch.ranks));
    teardown_with([&] { rank.domain.global_bs = 0; },
                  "global_bs is 0, in the setup it was " + std::to_string(3 * batch.ranks));
    teardown_with([&] { rank.modes.nums_type = 2; }, "expert_token_nums_type is 2, should be from 0 to 1");
    rank.mask.as<std::int8_t>()[1] = 0;
    expect("x_active_mask[2] is 1 after a 0: tokens that travel come before those that do not");
    rank.mask.as<std::int8_t>()[1] = 1;
    rank.dispatch_teardown(rank.dispatch_setup());
  });
}

TEST_P(Distribute, refuses_a_combine_of_another_dispatch) {
  run(GetParam(), [](const Context& context) {
    if (context.size() < 2) return;
    Batch batch = even_batch(context.size(), 0, 0, 2 * context.size(), 1, 3);
    batch.chosen.assign(at(context.size()), {0, 0, 0});
    const AscendRank rank(context, batch, {});
    rank.dispatch_teardown(rank.dispatch_setup());
    const auto expect = [&](const std::string& part) {
      const Error error = error_of([&] { rank.combine_teardown(rank.combine_setup()); });
      require(error.code() == ErrorCode::bad_argument && error.message().find(part) != std::string::npos, error.what());
    };
    std::int32_t& ordinal = rank.expand_idx.as<std::int32_t>()[2];
    ordinal = 1;
    expect("expand_idx[2] is 1, of these expert_ids 2");
    ordinal = 2;
    rank.mask.as<std::int8_t>()[2] = 0;
    expect("expand_idx[2] is 2, of these expert_ids 0");
    rank.mask.as<std::int8_t>()[2] = 1;
    std::int32_t& prefix = rank.info.as<std::int32_t>()[0];
    if (context.rank() == 0) prefix = 2;  // of 3, 3 more, ...
    if (context.rank() < 2) {
      expect(context.rank() == 0 ? "rank 0 returned 2 rows, expert_ids asks for 3" : "rank 0 returned 4 rows");
    } else {
      rank.combine_teardown(rank.combine_setup());
    }
    const std::int32_t kept = std::exchange(prefix, 1 << 20);
    expect("assist_info_for_combine[0] is 1048576, should be from 0 to ");
    prefix = kept == 2 ? 3 : kept;
    const Error twice = error_of([&] { rank.combine_teardown({}); });
    require(twice.message() == "comm_cmd_info holds nothing: its setup was not called, or its teardown has been",
            twice.what());
    rank.combine_teardown(rank.combine_setup());
  });
}

INSTANTIATE_TEST_SUITE_P(Ways, Distribute, testing::ValuesIn(every_way()), way_name);

// Four ranks, the first of which holds a shared expert; worked out by hand.
TEST(DistributeExample, has_the_rows_and_sums_that_the_semantics_give) {
  Batch batch = even_batch(4, 1, 1, 6, 2, 2);
  batch.chosen = {{0, 3, 3, 5}, {1, 2, 0, 1}, {3, 4, 5, 3}, {2, 0, 4, 5}};
  const std::vector<std::vector<Copy>> rows = {
      {{0, 0, 2}, {0, 1, 2}, {1, 0, 2}, {1, 1, 2}, {2, 0, 2}, {2, 1, 2}, {3, 0, 2}, {3, 1, 2}},
      {{0, 0, 0}, {1, 1, 0}, {3, 0, 1}, {1, 0, 0}, {1, 1, 1}},
      {{1, 0, 1}, {3, 0, 0}, {0, 0, 1}, {0, 1, 0}, {2, 0, 0}, {2, 1, 1}},
      {{2, 0, 1}, {3, 1, 0}, {0, 1, 1}, {2, 1, 0}, {3, 1, 1}}};
  const std::vector<std::vector<std::int32_t>> ordinals = {{0, 0, 1, 0}, {0, 0, 0, 1}, {0, 0, 0, 1}, {0, 0, 0, 0}};
  const std::vector<std::vector<std::int32_t>> prefix = {
      {2, 4, 6, 8}, {1, 2, 2, 3, 3, 5, 5, 5}, {0, 1, 1, 2, 4, 4, 6, 6}, {0, 0, 1, 2, 3, 3, 4, 5}};
  const std::vector<std::vector<std::int64_t>> counts = {{8}, {3, 2}, {2, 4}, {2, 3}};
  const std::vector<std::vector<std::int64_t>> sums = {{8}, {3, 5}, {2, 6}, {2, 5}};
  for (const std::int64_t nums_type : {0, 1}) {
    run({.ranks = 4}, [&](const Context& context) {
      const AscendRank rank(context, batch, {.nums_type = nums_type});
      EXPECT_EQ(rank.expand_x.view().size(0), context.rank() == 0 ? 8 : 16);
      rank.dispatch_teardown(rank.dispatch_setup());
      const std::size_t r = at(context.rank());
      for (std::size_t i = 0; i < rows[r].size(); ++i) {
        const std::vector<float> x = batch.x(rows[r][i].source, rows[r][i].token);
        for (std::int64_t h = 0; h < batch.h; ++h) {
          ASSERT_EQ(element(rank.expand_x, static_cast<std::int64_t>(i) * batch.h + h),
                    static_cast<float>(bf16(x[at(h)])));
        }
      }
      const auto same = [](const auto* values, const auto& wanted) {
        return std::vector(values, values + wanted.size()) == wanted;
      };
      EXPECT_TRUE(same(rank.expand_idx.as<std::int32_t>(), ordinals[r]));
      EXPECT_TRUE(same(rank.info.as<std::int32_t>(), prefix[r]));
      EXPECT_TRUE(same(rank.nums.as<std::int64_t>(), nums_type == 0 ? sums[r] : counts[r]));
    });
  }
}

// However late a rank is, the other works meanwhile: its setup returns before the late one has begun, and its teardown
// takes what that has posted, whatever it does next. No clock is needed to see it.
TEST(DistributeOverlap, a_setup_waits_for_nobody_and_a_teardown_for_setups_alone) {
  const auto wait = [](const std::latch& latch) {
    const auto since = std::chrono::steady_clock::now();
    while (!latch.try_wait()) {
      require(std::chrono::steady_clock::now() - since < std::chrono::seconds(20), "the ranks wait for each other");
      std::this_thread::yield();
    }
  };
  for (const int late : {0, 1}) {
    std::latch posted_early(1), posted_late(1), unpacked_early(1), returned_early(1), returned_late(1);
    run({.ranks = 2}, [&](const Context& context) {
      const AscendRank rank(context, even_batch(2, 0, 1, 4, 2, 8), {.quant_mode = 2});
      if (context.rank() == late) {
        wait(posted_early);
        ascend::CommCmdInfo posted = rank.dispatch_setup();
        posted_late.count_down();
        wait(unpacked_early);
        rank.dispatch_teardown(std::move(posted));
        wait(returned_early);
        posted = rank.combine_setup();
        returned_late.count_down();
        rank.combine_teardown(std::move(posted));
      } else {
        ascend::CommCmdInfo posted = rank.dispatch_setup();
        posted_early.count_down();
        wait(posted_late);  // own work, as long as the other rank is late
        rank.dispatch_teardown(std::move(posted));
        unpacked_early.count_down();
        posted = rank.combine_setup();
        returned_early.count_down();
        wait(returned_late);
        rank.combine_teardown(std::move(posted));
      }
    });
  }
}

}  // namespace
}  // namespace expar::test
