// The one-phase operators of npu_moe_distribute, against plain loops over all ranks' tokens.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>

#include <expar/collectives.h>

#include "tests/contract/ascend_rank.h"
#include "tests/contract/share.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

using ascend::Domain;

/// The memory of one rank, for batches of which at most `parts` tp ranks share their rows.
struct V2Rank {
  V2Rank(const Context& c, const Batch& b, std::int64_t parts = 1)
      : context(c), batch(b), domain(b.domain(c.rank())), ids(b.ids(c.rank())) {
    bs = batch.tokens[at(c.rank())];
    const std::int64_t h = batch.h, k = batch.topk, a = ascend::expand_rows(domain, c.rank(), bs, k);
    x = Array(DType::bf16, {bs, h});
    for (std::int64_t t = 0; t < bs; ++t) {
      const std::vector<float> row = batch.x(c.rank(), t);
      for (std::int64_t i = 0; i < h; ++i) set_element(x, t * h + i, row[at(i)]);
    }
    mask = batch.slot_masks ? Array(DType::int8, {bs, k}) : Array(DType::int8, {bs});
    for (std::int64_t i = 0; i < mask.view().elements(); ++i) {
      const std::int64_t per_token = batch.slot_masks ? k : 1;
      mask.as<std::int8_t>()[i] = batch.counts(c.rank(), i / per_token, i % per_token);
    }
    weights = Array(DType::f32, {bs, k});
    for (std::int64_t i = 0; i < bs * k; ++i) weights.as<float>()[i] = batch.weight(c.rank(), i / k, i % k);
    const std::int64_t local = domain.local_expert_num(c.rank());
    expand_x = Array(DType::bf16, {parts * a, h});
    info = Array(DType::int32, {a * 128});
    nums = Array(DType::int64, {local});
    ep_counts = Array(DType::int32, {local * batch.ranks * parts});
    tp_counts = Array(DType::int32, {parts});
    expand_scales = Array(DType::f32, {a});
    out = Array(DType::bf16, {bs, h});
    options.x_active_mask = mask;
  }

  ConstTensor id_tensor() const { return ConstTensor(ids.data(), Shape{bs, batch.topk}); }
  void dispatch() const {
    ascend::moe_distribute_dispatch_v2(context, domain, options,
                                       {.x = x, .expert_ids = id_tensor(), .expert_scales = weights},
                                       {.expand_x = expand_x,
                                        .assist_info_for_combine = info,
                                        .expert_token_nums = nums,
                                        .ep_recv_counts = ep_counts,
                                        .tp_recv_counts = options.tp_world_size == 2 ? tp_counts.view() : Tensor(),
                                        .expand_scales = expand_scales});
  }
  ascend::CombineV2 combining() const {
    ascend::CombineV2 in{.expand_x = expand_x, .expert_ids = id_tensor(), .ep_send_counts = ep_counts};
    in.expert_scales = weights;
    if (options.tp_world_size == 2) in.tp_send_counts = tp_counts;
    return in;
  }

  Context context;
  Batch batch;
  Domain domain;
  ascend::V2Options options;
  std::vector<std::int32_t> ids;
  std::int64_t bs;
  Array x, mask, weights, expand_x, info, nums, ep_counts, tp_counts, expand_scales, out;
};

/// x as it was sent.
std::vector<float> sent(const Batch& batch, int rank, std::int64_t token) {
  std::vector<float> row = batch.x(rank, token);
  for (float& value : row) value = static_cast<float>(bf16(value));
  return row;
}

/// Each row multiplied by its expert's number + 1, shared expert j's by 100 + j.
void run_experts(const V2Rank& rank) {
  const std::int64_t h = rank.batch.h, local = rank.domain.local_expert_num(rank.context.rank());
  std::int64_t row = 0, e = 0;
  for (const auto& of_expert : copies_for(rank.batch, rank.context.rank())) {
    const std::int64_t number = (rank.context.rank() - rank.batch.shared_ranks) * local + e++;
    for (const Copy& copy : of_expert) {
      const float factor = copy.k >= rank.batch.topk ? 100.0F + static_cast<float>(copy.k - rank.batch.topk)
                                                     : static_cast<float>(number + 1);
      for (std::int64_t i = row * h; i < (row + 1) * h; ++i)
        set_element(rank.expand_x, i, factor * element(rank.expand_x, i));
      ++row;
    }
  }
}

/// What combine must give of token t, and how large the terms are that were rounded; special(k, id, sum) adds the term
/// of an expert without a rank.
template <class Special>
void expect_sums(const V2Rank& rank, const Special& special) {
  const Batch& batch = rank.batch;
  for (std::int64_t t = 0; t < rank.bs; ++t) {
    const std::vector<float> x = sent(batch, rank.context.rank(), t);
    for (std::int64_t i = 0; i < batch.h; ++i) {
      double sum = 0, sizes = 0;
      const auto add = [&](double term) {
        sum += term;
        sizes += std::fabs(term);
      };
      for (std::int64_t k = 0; k < batch.topk; ++k) {
        if (!batch.counts(rank.context.rank(), t, k)) continue;
        const std::int32_t id = rank.ids[at(t * batch.topk + k)];
        const double weight = batch.weight(rank.context.rank(), t, k);
        add(weight * (id < batch.experts ? (id + 1) * static_cast<double>(x[at(i)]) : special(id, t, i, x)));
      }
      for (std::int64_t j = 0; batch.shared_ranks > 0 && j < batch.shared && batch.visits(rank.context.rank(), t); ++j)
        add((100 + static_cast<double>(j)) * x[at(i)]);
      const double got = element(rank.out, t * batch.h + i);
      require_near(got, sum, (sizes + std::fabs(sum)) * 0x1p-8 * 1.01 + 1e-30,
                   [&] { return batch.str() + ": out[" + std::to_string(t) + "," + std::to_string(i) + "]"; });
    }
  }
}

double no_special(std::int32_t, std::int64_t, std::int64_t, const std::vector<float>&) { return 0; }

class DistributeV2 : public EveryWay {};

TEST_P(DistributeV2, names_the_token_and_the_weight_of_every_row) {
  run(GetParam(), [](const Context& context) {
    if (context.size() < 2) return;
    for (std::uint64_t seed = 1; seed <= 4; ++seed) {
      Batch batch = random_batch(context.size(), seed);
      batch.slot_masks = seed % 2 == 0;
      const V2Rank rank(context, batch);
      rank.dispatch();
      const auto* const info = rank.info.as<std::int32_t>();
      std::int64_t row = 0, local = 0;
      for (const auto& of_expert : copies_for(batch, context.rank())) {
        for (const Copy& copy : of_expert) {
          require(info[3 * row] == copy.source && info[3 * row + 1] == copy.token && info[3 * row + 2] == copy.k,
                  batch.str() + ": a row's token");
          const float weight = copy.k < batch.topk ? batch.weight(copy.source, copy.token, copy.k) : 1.0F;
          require(rank.expand_scales.as<float>()[row] == weight, batch.str() + ": a row's weight");
          const std::vector<float> x = sent(batch, copy.source, copy.token);
          for (std::int64_t i = 0; i < batch.h; ++i)
            require_near(element(rank.expand_x, row * batch.h + i), x[at(i)], 0,
                         [&] { return batch.str() + ": a row"; });
          ++row;
        }
        require(rank.ep_counts.as<std::int32_t>()[(local + 1) * batch.ranks - 1] == row, batch.str() + ": a count");
        require(rank.nums.as<std::int64_t>()[local] == std::ssize(of_expert), batch.str() + ": expert_token_nums");
        ++local;
      }
    }
  });
}

TEST_P(DistributeV2, sums_what_a_mask_of_slots_leaves) {
  run(GetParam(), [](const Context& context) {
    if (context.size() < 2) return;
    for (std::uint64_t seed = 31; seed <= 32; ++seed) {
      Batch batch = random_batch(context.size(), seed);
      batch.slot_masks = true;
      const V2Rank rank(context, batch);
      rank.dispatch();
      run_experts(rank);
      ascend::moe_distribute_combine_v2(context, rank.domain, rank.options, rank.combining(), rank.out);
      expect_sums(rank, no_special);
    }
  });
}

TEST_P(DistributeV2, adds_experts_that_need_no_rank) {
  run(GetParam(), [](const Context& context) {
    if (context.size() < 2) return;
    for (const std::int64_t constants : {0, 2}) {
      Batch batch = random_batch(context.size(), 41);
      batch.special = 3 + constants;  // a zero, two copies
      batch.topk = std::min<std::int64_t>(batch.experts + batch.special, 6);
      V2Rank rank(context, batch);
      rank.options.zero_expert_num = 1;
      rank.options.copy_expert_num = 2;
      rank.options.const_expert_num = constants;
      const Array alpha_1(DType::bf16, {constants, batch.h}), alpha_2(DType::bf16, {constants, batch.h}),
          v(DType::bf16, {constants, batch.h});
      const Random random(6, "constants");
      for (std::int64_t i = 0; i < constants * batch.h; ++i) {
        const auto index = static_cast<std::uint64_t>(3 * i);
        set_element(alpha_1, i, 0.02F * random.normal(index));
        set_element(alpha_2, i, 0.02F * random.normal(index + 1));
        set_element(v, i, random.normal(index + 2));
      }
      rank.dispatch();
      run_experts(rank);
      ascend::CombineV2 in = rank.combining();
      in.ori_x = rank.x;
      if (constants > 0) {
        in.const_expert_alpha_1 = alpha_1;
        in.const_expert_alpha_2 = alpha_2;
        in.const_expert_v = v;
      }
      ascend::moe_distribute_combine_v2(context, rank.domain, rank.options, in, rank.out);
      const auto dot = [&](const Array& alpha, std::int64_t c, const std::vector<float>& x) {
        double sum = 0;
        for (std::int64_t i = 0; i < batch.h; ++i)
          sum += element(alpha, c * batch.h + i) * static_cast<double>(x[at(i)]);
        return sum;
      };
      std::int64_t known_token = -1;
      std::int32_t known_id = -1;
      double share = 0;
      expect_sums(rank, [&](std::int32_t id, std::int64_t t, std::int64_t i, const std::vector<float>& x) -> double {
        const std::int64_t which = id - batch.experts;
        if (which < 1) return 0;
        if (which < 3) return x[at(i)];
        if (t != known_token || id != known_id) {
          share = 1 / (1 + std::exp(dot(alpha_2, which - 3, x) - dot(alpha_1, which - 3, x)));
          known_token = t;
          known_id = id;
        }
        return share * x[at(i)] + (1 - share) * element(v, (which - 3) * batch.h + i);
      });
    }
  });
}

TEST_P(DistributeV2, refuses_on_every_rank_what_one_of_them_may_not_ask) {
  run(GetParam(), [](const Context& context) {
    if (context.size() < 2) return;
    V2Rank rank(context, even_batch(context.size(), 0, 1, 2 * context.size(), 2, 3));
    const auto expect = [&](const std::string& message) {
      const Error error = error_of([&] { rank.dispatch(); });
      require(error.code() == ErrorCode::bad_argument && error.rank() == 1 && error.message() == message, error.what());
      rank.options = {.x_active_mask = rank.mask};
      rank.domain = rank.batch.domain(context.rank());
    };
    const bool here = context.rank() == 1;
    if (here) rank.options.tp_world_size = 3;
    expect("tp_world_size is 3, should be from 0 to 2");
    if (here) rank.options.tp_world_size = 2;
    expect("group_tp is absent: tp_world_size is 2");
    if (here) rank.domain.comm_alg = "ring";
    expect(
        "comm_alg is \"ring\", should be one of \"\", \"fullmesh\", \"fullmesh_v1\", \"fullmesh_v2\", \"hierarchy\"");
    if (here) rank.domain.comm_alg = "hierarchy";
    expect("ep_world_size under comm_alg \"hierarchy\" is " + std::to_string(context.size()) +
           ", should be from 16 to 256");
    if (here) rank.options.copy_expert_num = -1;
    expect("copy_expert_num is -1, should be from 0 to 1024");
    rank.options.zero_expert_num = here ? 1 : 0;
    const Error error = error_of([&] { rank.dispatch(); });
    require(error.code() == ErrorCode::mismatch, error.what());
    rank.options.zero_expert_num = 0;
    rank.dispatch();
  });
}

INSTANTIATE_TEST_SUITE_P(Ways, DistributeV2, testing::ValuesIn(every_way()), way_name);

/// Even and odd ranks are ep groups, each two that follow each other a tp group.
struct Groups {
  explicit Groups(const Context& all)
      : ep(all.on(all.communicator().split(all.rank() % 2, all.rank()))),
        tp(all.on(all.communicator().split(all.rank() / 2, all.rank()))) {}
  Context ep, tp;
};

V2Rank tp_rank(const Groups& groups, const Batch& batch) {
  V2Rank rank(groups.ep, batch, 2);
  rank.options.group_tp = &groups.tp;
  rank.options.tp_world_size = 2;
  rank.options.tp_rank_id = groups.tp.rank();
  return rank;
}

TEST(TensorParallel, ranks_have_each_others_rows_and_add_their_parts) {
  run({.ranks = 6}, [](const Context& all) {
    Batch batch = even_batch(3, 0, 1, 3, 2, 4);
    batch.seed = static_cast<std::uint64_t>(50 + all.rank() % 2);
    const Groups groups(all);
    const auto& [ep, tp] = groups;
    const V2Rank rank = tp_rank(groups, batch);
    rank.dispatch();
    std::int64_t row = 0;
    for (int part = 0; part < 2; ++part) {
      Batch theirs = batch;
      theirs.seed = static_cast<std::uint64_t>(50 + part);
      const auto copies = copies_for(theirs, ep.rank())[0];
      EXPECT_EQ(rank.tp_counts.as<std::int32_t>()[part], std::ssize(copies));
      EXPECT_EQ(rank.ep_counts.as<std::int32_t>()[3 * part + 2], std::ssize(copies));
      for (const Copy& copy : copies) {
        const std::vector<float> x = sent(theirs, copy.source, copy.token);
        // The tp ranks' parts are 1/4 and 3/4 of the expert's result.
        const float factor = static_cast<float>(ep.rank() + 1) * (tp.rank() == 0 ? 0.25F : 0.75F);
        for (std::int64_t i = 0; i < batch.h; ++i) {
          ASSERT_EQ(element(rank.expand_x, row * batch.h + i), x[at(i)]);
          set_element(rank.expand_x, row * batch.h + i, factor * x[at(i)]);
        }
        ++row;
      }
    }
    ascend::moe_distribute_combine_v2(ep, rank.domain, rank.options, rank.combining(), rank.out);
    // Three roundings: of a part, of their sum, of out.
    for (std::int64_t t = 0; t < rank.bs; ++t) {
      const std::vector<float> x = sent(batch, ep.rank(), t);
      for (std::int64_t i = 0; i < batch.h; ++i) {
        double sum = 0, sizes = 0;
        for (std::int64_t k = 0; k < batch.topk; ++k) {
          const double term = batch.weight(ep.rank(), t, k) * (rank.ids[at(t * batch.topk + k)] + 1) * x[at(i)];
          sum += term;
          sizes += std::fabs(term);
        }
        ASSERT_NEAR(element(rank.out, t * batch.h + i), sum, (2 * sizes + std::fabs(sum)) * 0x1p-8 * 1.01);
      }
    }
  });
}

TEST(TensorParallel, errors_reach_the_tp_ranks_and_theirs) {
  const auto ends = run_all({.ranks = 4}, [](const Context& all) {
    const Groups groups(all);
    V2Rank rank = tp_rank(groups, even_batch(2, 0, 1, 2, 1, 2));
    rank.dispatch();
    ascend::CombineV2 in = rank.combining();
    if (all.rank() == 3) in.tp_send_counts = {};
    ascend::moe_distribute_combine_v2(rank.context, rank.domain, rank.options, in, rank.out);
  });
  for (const Outcome& end : ends) {
    ASSERT_TRUE(end.error.has_value());
    EXPECT_EQ(end.error->message(), "tp_send_counts is f32 [], should be int32 [2]");
  }
}

TEST(TensorParallel, ranks_that_quantise_differently_are_refused) {
  const auto ends = run_all({.ranks = 4}, [](const Context& all) {
    const Groups groups(all);
    V2Rank rank = tp_rank(groups, even_batch(2, 0, 1, 2, 1, 2));
    if (all.rank() % 2 == 1) rank.batch.h += 8;
    rank.expand_x = Array(DType::bf16, {rank.expand_x.view().size(0), rank.batch.h});
    rank.x = Array(DType::bf16, {2, rank.batch.h});
    rank.dispatch();
  });
  for (const Outcome& end : ends) {
    ASSERT_TRUE(end.error.has_value());
    EXPECT_EQ(end.error->message(), "the tp ranks differ in H: 1024 and 1032");
  }
}

TEST(Hierarchy, gives_the_same_rows_and_sums) {
  run({.ranks = 16}, [](const Context& context) {
    V2Rank rank(context, even_batch(16, 0, 1, 32, 3, 2));
    rank.domain.comm_alg = "hierarchy";
    rank.dispatch();
    run_experts(rank);
    ascend::moe_distribute_combine_v2(context, rank.domain, rank.options, rank.combining(), rank.out);
    expect_sums(rank, no_special);
  });
}

TEST(Elastic, ranks_that_are_out_are_left_out) {
  // Of five ranks 1 is out; 0 held a shared expert and still does, the experts are on three ranks then.
  run({.ranks = 5}, [](const Context& all) {
    const bool out = all.rank() == 1;
    const Communicator left = all.communicator().split(out ? -1 : 0, all.rank());
    if (out) return;
    const Context context = all.on(left);
    Batch batch = even_batch(4, 1, 1, 6, 2, 3);
    V2Rank rank(context, batch);
    rank.domain = even_batch(5, 1, 1, 8, 2, 3).domain(all.rank());
    const std::vector<std::int32_t> info = {1, 4, 1, 6, 0, -1, 1, 2, 3, 0, 2, 3, 4, -1};
    rank.options.elastic_info = ConstTensor(info.data(), Shape{14});
    const Array waited(DType::int64, {5});
    rank.options.performance_info = waited;
    rank.expand_x = Array(DType::bf16, {ascend::expand_rows(rank.domain, all.rank(), 3, 2) * 2, batch.h});
    rank.info = Array(DType::int32, {rank.expand_x.view().size(0) * 128});
    rank.expand_scales = Array(DType::f32, {rank.expand_x.view().size(0)});
    barrier(context);
    if (all.rank() == 4) std::this_thread::sleep_for(std::chrono::milliseconds(150));
    rank.dispatch();
    if (all.rank() != 4) {
      EXPECT_GT(waited.as<std::int64_t>()[4], 25000) << "by its number of old";
    }
    std::int64_t row = 0;
    for (const auto& of_expert : copies_for(batch, context.rank())) {
      for (const Copy& copy : of_expert) {
        EXPECT_EQ(rank.info.as<std::int32_t>()[3 * row], copy.source == 0 ? 0 : copy.source + 1) << "its number of old";
        EXPECT_EQ(rank.info.as<std::int32_t>()[3 * row + 1], copy.token);
        ++row;
      }
    }
    const Domain whole = rank.domain;
    rank.domain = batch.domain(context.rank());
    run_experts(rank);
    ascend::moe_distribute_combine_v2(context, whole, rank.options, rank.combining(), rank.out);
    expect_sums(rank, no_special);
  });
}

TEST(Performance, shows_who_was_waited_for) {
  run({.ranks = 3}, [](const Context& context) {
    V2Rank rank(context, even_batch(3, 0, 1, 3, 2, 4));
    const Array waited(DType::int64, {3});
    waited.as<std::int64_t>()[1] = 1000000;
    rank.options.performance_info = waited;
    barrier(context);
    if (context.rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(150));
    rank.dispatch();
    if (context.rank() == 1) return;
    EXPECT_GT(waited.as<std::int64_t>()[1], 1000000 + 25000) << "microseconds, added to what was there";
    EXPECT_EQ(waited.as<std::int64_t>()[context.rank()], 0);
    EXPECT_LT(waited.as<std::int64_t>()[2 - context.rank()], 1000000) << "who was early too";
  });
}

TEST(CombineAddRmsNorm, normalises_the_sum_with_the_residual) {
  run({.ranks = 2}, [](const Context& context) {
    const Batch batch = even_batch(2, 0, 1, 4, 2, 3);
    const V2Rank rank(context, batch);
    const std::int64_t h = batch.h;
    const Array residual(DType::bf16, {3, 1, h}), gamma(DType::bf16, {h}), y(DType::bf16, {3, 1, h}),
        x(DType::bf16, {3, 1, h}), rstd(DType::f32, {3, 1, 1});
    const Random random(9, "norm");
    for (std::int64_t i = 0; i < 3 * h; ++i) set_element(residual, i, random.normal(static_cast<std::uint64_t>(i)));
    for (std::int64_t i = 0; i < h; ++i)
      set_element(gamma, i, 1 + 0.1F * random.normal(static_cast<std::uint64_t>(4 * h + i)));
    rank.dispatch();
    run_experts(rank);
    ascend::moe_distribute_combine_add_rms_norm(context, rank.domain, rank.options, rank.combining(),
                                                {.residual_x = residual, .gamma = gamma}, y, rstd, x);
    for (std::int64_t t = 0; t < 3; ++t) {
      const std::vector<float> own = sent(batch, context.rank(), t);
      double squares = 0;
      for (std::int64_t i = t * h; i < (t + 1) * h; ++i) {
        double sum = element(residual, i), sizes = std::fabs(sum);
        for (std::int64_t k = 0; k < 2; ++k) {
          const double term = batch.weight(context.rank(), t, k) * (rank.ids[at(t * 2 + k)] + 1) * own[at(i - t * h)];
          sum += term;
          sizes += std::fabs(term);
        }
        const double got = element(x, i);
        ASSERT_NEAR(got, sum, (sizes + std::fabs(sum)) * 0x1p-8 * 1.01);
        squares += got * got;
      }
      const double scale = 1 / std::sqrt(squares / static_cast<double>(h) + 1e-6);
      ASSERT_NEAR(rstd.as<float>()[t], scale, scale * 1e-5);
      for (std::int64_t i = t * h; i < (t + 1) * h; ++i) {
        const double wanted = element(x, i) * scale * element(gamma, i - t * h);
        ASSERT_NEAR(element(y, i), wanted, std::fabs(wanted) * 0x1p-7 * 1.01);
      }
    }
  });
}

}  // namespace
}  // namespace expar::test
