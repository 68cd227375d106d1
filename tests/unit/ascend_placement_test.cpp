// Experts to instances: the examples that can be worked out by hand, every number of ranks and instances, and pruning.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <expar/ascend/placement.h>

#include "tests/error_of.h"

namespace expar::ascend {
namespace {

using Ids = std::vector<std::int32_t>;

/// A table of rows of different lengths.
struct Table {
  explicit Table(const std::vector<Ids>& rows) {
    std::size_t width = 1;
    for (const Ids& row : rows) width = std::max(width, row.size() + 1);
    for (const Ids& row : rows) {
      cells.push_back(static_cast<std::int32_t>(row.size()));
      cells.insert(cells.end(), row.begin(), row.end());
      cells.resize(cells.size() + width - 1 - row.size(), -7);  // what is ignored
    }
    view = {cells.data(), {static_cast<std::int64_t>(rows.size()), static_cast<std::int64_t>(width)}};
  }
  Table(const Table&) = delete;

  Ids cells;
  ConstTensor view;
};

ConstTensor column(const Ids& ids) { return {ids.data(), {static_cast<std::int64_t>(ids.size()), 1}}; }

Ids values(const Array& array) {
  const Tensor view = array;
  return {view.as<std::int32_t>(), view.as<std::int32_t>() + view.elements()};
}

/// The instance that each rank takes of the one expert.
Ids by_rank(const Ids& instances, std::int64_t ranks, std::int64_t mode) {
  const Table table({instances});
  Ids all;
  for (std::int64_t r = 0; r < ranks; ++r) {
    all.push_back(values(moe_eplb_update_expert(column({0}), table.view, r, ranks, mode))[0]);
  }
  return all;
}

TEST(AscendPlacement, gives_the_choices_that_can_be_worked_out_by_hand) {
  EXPECT_EQ(by_rank({5}, 8, 0), (Ids{5, 5, 5, 5, 5, 5, 5, 5}));
  EXPECT_EQ(by_rank({3, 9}, 8, 0), (Ids{3, 3, 3, 3, 9, 9, 9, 9}));
  EXPECT_EQ(by_rank({4, 7, 1}, 8, 0), (Ids{4, 4, 4, 7, 7, 7, 1, 1}));
  EXPECT_EQ(by_rank({4, 7, 1}, 8, 2), (Ids{4, 4, 4, 7, 7, 7, 1, 1}));
  EXPECT_EQ(by_rank({0, 1, 2}, 4, 0), (Ids{0, 0, 1, 1}));
  EXPECT_EQ(by_rank({0, 1, 2}, 4, 2), (Ids{0, 0, 1, 2}));
  const Table table({{4, 7, 1}});
  EXPECT_EQ(values(moe_eplb_update_expert(column({0, 0, 0, 0, 0}), table.view, 6, 8, 1)), (Ids{4, 7, 1, 4, 7}));
}

TEST(AscendPlacement, shares_ranks_among_instances_as_measured) {
  struct Case {
    std::int64_t ranks;
    int instances;
    Ids loads;
  };
  for (const Case& c : {Case{8, 5, {2, 2, 2, 2, 0}}, Case{8, 6, {2, 2, 2, 2, 0, 0}}, Case{8, 7, {2, 2, 2, 2, 0, 0, 0}},
                        Case{4, 3, {2, 2, 0}}, Case{32, 5, {7, 7, 7, 7, 4}}}) {
    Ids instances(static_cast<std::size_t>(c.instances)), loads(instances.size());
    std::iota(instances.begin(), instances.end(), 0);
    for (const std::int32_t i : by_rank(instances, c.ranks, 0)) ++loads[static_cast<std::size_t>(i)];
    EXPECT_EQ(loads, c.loads) << c.ranks << " ranks";
  }
}

TEST(AscendPlacement, never_leaves_the_instances_and_proportionally_none_idle) {
  const Ids id{0};
  for (const std::int64_t ranks : {2, 3, 7, 8, 16, 31, 64, 129, 384}) {
    for (int count = 1; count <= ranks; count += ranks > 64 ? 13 : 1) {
      Ids instances(static_cast<std::size_t>(count)), loads(instances.size(), 0);
      std::iota(instances.begin(), instances.end(), 0);
      const Table table({instances});
      for (std::int64_t r = 0; r < ranks; ++r) {
        // at() of what lies outside would throw.
        instances.at(static_cast<std::size_t>(values(moe_eplb_update_expert(column(id), table.view, r, ranks))[0]));
        ++loads.at(static_cast<std::size_t>(values(moe_eplb_update_expert(column(id), table.view, r, ranks, 2))[0]));
      }
      EXPECT_GE(*std::min_element(loads.begin(), loads.end()), ranks / count);
      EXPECT_LE(*std::max_element(loads.begin(), loads.end()), (ranks + count - 1) / count);
    }
  }
}

TEST(AscendPlacement, maps_random_batches_slot_by_slot) {
  std::mt19937 random(3);
  const auto below = [&](std::int64_t end) { return static_cast<std::int64_t>(random() % static_cast<unsigned>(end)); };
  for (int draw = 0; draw < 60; ++draw) {
    const std::int64_t ranks = 2 + below(30), experts = 1 + below(40),
                       topk = 1 + below(std::min<std::int64_t>(16, experts));
    const std::int64_t tokens = 1 + below(40), rank = below(ranks), mode = below(3);
    Ids pool(1024);
    std::iota(pool.begin(), pool.end(), 0);
    std::shuffle(pool.begin(), pool.end(), random);
    std::vector<Ids> rows;
    for (std::int64_t e = 0; e < experts; ++e) {
      const auto count = 1 + below(std::min<std::int64_t>(ranks, 6));
      rows.emplace_back(pool.end() - count, pool.end());
      pool.resize(pool.size() - static_cast<std::size_t>(count));
    }
    const Table table(rows);
    std::vector<std::int64_t> ids;
    for (std::int64_t i = 0; i < tokens * topk; ++i) ids.push_back(below(experts));
    const Array out = moe_eplb_update_expert({ids.data(), {tokens, topk}}, table.view, rank, ranks, mode);
    const UpdatedExperts same = moe_update_expert({ids.data(), {tokens, topk}}, table.view,
                                                  {.local_rank_id = rank, .world_size = ranks, .balance_mode = mode});
    for (std::int64_t i = 0; i < tokens * topk; ++i) {
      const Ids& row = rows[static_cast<std::size_t>(ids[static_cast<std::size_t>(i)])];
      const auto c = static_cast<std::int64_t>(row.size());
      std::int64_t place = 0;
      if (mode == 0) {
        for (std::int64_t ranks_each = (ranks + c - 1) / c, r = ranks_each; r <= rank; r += ranks_each) ++place;
      } else if (mode == 1) {
        place = i / topk % c;
      } else {
        while ((place + 1) * ranks <= rank * c) ++place;
      }
      EXPECT_EQ(out.as<std::int64_t>()[i], row[static_cast<std::size_t>(place)]);
      EXPECT_EQ(same.balanced_expert_ids.as<std::int64_t>()[i], out.as<std::int64_t>()[i]);
      EXPECT_EQ(same.balanced_active_mask.as<std::int8_t>()[i], 1);
    }
  }
}

TEST(AscendPlacement, drops_slots_below_their_share_of_the_sum) {
  const Table table({{0}, {1}, {2}});
  const Ids ids{0, 1, 2, 2, 1, 0, 0, 2, 1};
  const std::vector<float> scales{0.5F, 0.25F, 0.25F, 8, 1, 1, 3, 2, 1}, threshold{0.5F, 0.25F, 0.125F};
  const std::vector<std::int8_t> active{1, 1, 0};
  UpdateExpertOptions options{
      .expert_scales = {scales.data(), {3, 3}}, .pruning_threshold = {threshold.data(), {1, 3}}, .balance_mode = 1};
  const auto mask = [&] {
    const UpdatedExperts updated = moe_update_expert({ids.data(), {3, 3}}, table.view, options);
    EXPECT_EQ(values(updated.balanced_expert_ids), ids);
    const Tensor view = updated.balanced_active_mask;
    return std::vector<int>(view.as<std::int8_t>(), view.as<std::int8_t>() + 9);
  };
  EXPECT_EQ(mask(), (std::vector<int>{1, 1, 1, 1, 0, 0, 1, 1, 1}));
  options.active_mask = {active.data(), {3}};
  options.pruning_threshold = {threshold.data(), {3}};
  EXPECT_EQ(mask(), (std::vector<int>{1, 1, 1, 1, 0, 0, 0, 0, 0}));
  std::vector<bf16> low;
  for (const float scale : scales) low.emplace_back(scale);
  options.expert_scales = {low.data(), {3, 3}};
  EXPECT_EQ(mask(), (std::vector<int>{1, 1, 1, 1, 0, 0, 0, 0, 0}));
}

TEST(AscendPlacement, refuses_what_the_page_does_not_allow) {
  const Table good({{0, 1}, {2}, {3}});
  const Ids ids{0, 1, 2, 0};
  const ConstTensor two(ids.data(), {2, 2});
  const auto refusal = [](ConstTensor expert_ids, ConstTensor table, std::int64_t rank = 0, std::int64_t ranks = 4,
                          std::int64_t mode = 0) {
    return test::refusal_of([&] { moe_eplb_update_expert(expert_ids, table, rank, ranks, mode); });
  };
  EXPECT_EQ(refusal(two, good.view, 0, 1), "world_size is 1, should be from 2 to 384");
  EXPECT_EQ(refusal(two, good.view, 0, 385), "world_size is 385, should be from 2 to 384");
  EXPECT_EQ(refusal(two, good.view, 4, 4), "local_rank_id is 4, should be from 0 to 3");
  EXPECT_EQ(refusal(two, good.view, -1, 4), "local_rank_id is -1, should be from 0 to 3");
  EXPECT_EQ(refusal(two, good.view, 0, 4, 3), "balance_mode is 3, should be from 0 to 2");
  EXPECT_EQ(refusal({ids.data(), {4}}, good.view), "expert_ids is int32 [4], should have 2 axes");
  EXPECT_EQ(refusal({ids.data(), {1, 4}}, good.view), "K of expert_ids is 4, should be from 1 to 3");
  EXPECT_EQ(refusal({ids.data(), {0, 2}}, good.view), "BS of expert_ids is 0, should be from 1 to 512");
  EXPECT_EQ(refusal({ids.data(), DType::f32, {2, 2}}, good.view), "expert_ids is f32 [2, 2], should be int32 or int64");
  EXPECT_EQ(refusal(two, {good.view.data(), DType::int64, {3, 3}}),
            "eplb_table is int64 [3, 3], should be int32 [3, 3]");
  const Ids many(513, 0);
  EXPECT_EQ(refusal(column(many), good.view), "BS of expert_ids is 513, should be from 1 to 512");
  const Ids large(513 * 2, 1);
  EXPECT_EQ(refusal(two, {large.data(), {513, 2}}), "E of eplb_table is 513, should be from 1 to 512");
  EXPECT_EQ(refusal(two, {large.data(), {3, 6}}), "F of eplb_table is 6, should be from 2 to 5");
  EXPECT_EQ(refusal(two, {large.data(), {3, 1}}), "F of eplb_table is 1, should be from 2 to 5");
  const Ids outside{0, 1, -1, 0}, beyond{0, 3, 1, 0};
  EXPECT_EQ(refusal({outside.data(), {2, 2}}, good.view), "expert_ids[1,0] is -1, should be from 0 to 2");
  EXPECT_EQ(refusal({beyond.data(), {2, 2}}, good.view), "expert_ids[0,1] is 3, should be from 0 to 2");
  const Ids none{0, 1}, more{3, 0, 1}, negative{1, -1}, high{1, 1024}, twice{2, 5, 5}, shared{1, 5, 1, 5};
  const Ids zero{0};
  EXPECT_EQ(refusal(column(zero), {none.data(), {1, 2}}), "eplb_table[0,0] is 0, should be 1");
  EXPECT_EQ(refusal(column(zero), {more.data(), {1, 3}}), "eplb_table[0,0] is 3, should be from 1 to 2");
  EXPECT_EQ(refusal(column(zero), {negative.data(), {1, 2}}), "eplb_table[0,1] is -1, should be from 0 to 1023");
  EXPECT_EQ(refusal(column(zero), {high.data(), {1, 2}}), "eplb_table[0,1] is 1024, should be from 0 to 1023");
  EXPECT_EQ(refusal(column(zero), {twice.data(), {1, 3}}),
            "eplb_table[0,2] is 5, an instance that expert 0 has already");
  EXPECT_EQ(refusal(column(zero), {shared.data(), {2, 2}}),
            "eplb_table[1,1] is 5, an instance that expert 0 has already");
}

TEST(AscendPlacement, refuses_pruning_that_lacks_an_input_or_has_a_wrong_one) {
  const Table table({{0}, {1}});
  const Ids ids{0, 1, 1, 0};
  const std::vector<float> scales{2, 1, 2, 1}, ascending{2, 1, 1, 2}, threshold{0.5F, 0.5F};
  const std::vector<float> nan{2, std::numeric_limits<float>::quiet_NaN(), 2, 1};
  const std::vector<std::int8_t> late{0, 1};
  const UpdateExpertOptions good{
      .expert_scales = {scales.data(), {2, 2}}, .pruning_threshold = {threshold.data(), {2}}, .balance_mode = 1};
  const auto refusal = [&](const std::function<void(UpdateExpertOptions&)>& change) {
    UpdateExpertOptions options = good;
    change(options);
    return test::refusal_of([&] { moe_update_expert({ids.data(), {2, 2}}, table.view, options); });
  };
  using O = UpdateExpertOptions;
  EXPECT_EQ(refusal([](O& o) { o.balance_mode = 0; }), "world_size is -1, should be from 2 to 768");
  EXPECT_EQ(refusal([](O& o) { o.balance_mode = 2, o.world_size = 769; }),
            "world_size is 769, should be from 2 to 768");
  EXPECT_EQ(refusal([](O& o) { o.balance_mode = 0, o.world_size = 3; }), "local_rank_id is -1, should be from 0 to 2");
  EXPECT_EQ(refusal([](O& o) { o.pruning_threshold = {}; }), "expert_scales is given without pruning_threshold");
  EXPECT_EQ(refusal([](O& o) { o.expert_scales = {}; }), "pruning_threshold is given without expert_scales");
  EXPECT_EQ(refusal([&](O& o) {
              o = {.active_mask = {late.data(), {2}}, .balance_mode = 1};
            }),
            "active_mask is given without expert_scales and pruning_threshold");
  EXPECT_EQ(refusal([&](O& o) {
              o.active_mask = {late.data(), {2}};
            }),
            "active_mask[1] is true after a false one, should be all true ones first");
  EXPECT_EQ(refusal([&](O& o) { o.active_mask = {late.data(), {1}}; }), "active_mask is int8 [1], should be int8 [2]");
  EXPECT_EQ(refusal([&](O& o) {
              o.expert_scales = {ascending.data(), {2, 2}};
            }),
            "expert_scales[1,1] is 2.000000, should be a number not above 1.000000 before it");
  EXPECT_EQ(refusal([&](O& o) {
              o.expert_scales = {nan.data(), {2, 2}};
            }),
            "expert_scales[0,1] is nan, should be a number not above 2.000000 before it");
  EXPECT_EQ(refusal([&](O& o) {
              o.expert_scales = {scales.data(), {4}};
            }),
            "expert_scales is f32 [4], should be f32 [2, 2]");
  EXPECT_EQ(refusal([&](O& o) {
              o.expert_scales = {scales.data(), DType::int8, {2, 2}};
            }),
            "expert_scales is int8 [2, 2], should be f32, bf16 or f16");
  EXPECT_EQ(refusal([&](O& o) {
              o.pruning_threshold = {threshold.data(), {1}};
            }),
            "pruning_threshold is f32 [1], should be f32 [2]");
}

}  // namespace
}  // namespace expar::ascend
