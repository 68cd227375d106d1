// What a plan says, against plain loops over the ids of all ranks.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include <expar/plan.h>

#include "src/dispatch/plan_data.h"
#include "tests/contract/routes.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

/// The ranks' ids, and who holds what, as a plan of a workload must see them.
class Plans : public EveryWay {
 protected:
  /// Calls check(context, workload, plan, ids of all ranks) for each workload and two alignments.
  template <class Check>
  static void for_each_plan(Check check) {
    run(GetParam(), [&](const Context& context) {
      for (const Workload& w : workloads(context.size())) {
        std::vector<std::vector<std::int32_t>> ids;
        for (int rank = 0; rank < w.ranks; ++rank) ids.push_back(w.ids(rank));
        for (const std::int64_t alignment : {1, 8}) {
          const auto& own = ids[at(context.rank())];
          const ConstTensor tensor(own.data(), Shape{w.tokens[at(context.rank())], w.topk});
          const Plan plan = make_plan(context, tensor,
                                      {.experts = w.experts, .first_experts = w.first_experts, .alignment = alignment});
          try {
            check(context, w, plan, ids, alignment);
          } catch (const std::runtime_error& error) {
            throw std::runtime_error(w.name + ", alignment " + std::to_string(alignment) + ": " + error.what());
          }
        }
      }
    });
  }
};

using Ids = std::vector<std::vector<std::int32_t>>;

std::int64_t rows_of(const Ids& ids, int rank, std::int64_t expert) {
  return std::count(ids[at(rank)].begin(), ids[at(rank)].end(), static_cast<std::int32_t>(expert));
}
std::int64_t total(const Ids& ids, std::int64_t expert) {
  std::int64_t rows = 0;
  for (std::size_t rank = 0; rank < ids.size(); ++rank) rows += rows_of(ids, static_cast<int>(rank), expert);
  return rows;
}
bool is_in(const ExpertRange& range, std::int64_t expert) {
  return expert >= range.first && expert < range.first + range.count;
}

/// Where the rows of `expert` begin at its owner: behind those of the owner's experts before it, each padded.
std::int64_t first_row(const Plan& plan, const Ids& ids, std::int64_t expert, std::int64_t alignment) {
  int owner = 0;
  while (!is_in(plan.held_by(owner), expert)) ++owner;
  std::int64_t row = 0;
  for (std::int64_t e = plan.held_by(owner).first; e < expert; ++e)
    row += (total(ids, e) + alignment - 1) / alignment * alignment;
  return row;
}

/// The tokens of `source` that need `rank`, each once.
std::vector<std::int32_t> tokens_for(const Plan& plan, const Workload& w, const Ids& ids, int source, int rank) {
  std::vector<std::int32_t> tokens;
  for (std::int32_t t = 0; source != rank && t < w.tokens[at(source)]; ++t) {
    const auto first = ids[at(source)].begin() + t * w.topk;
    if (std::any_of(first, first + w.topk, [&](auto e) { return is_in(plan.held_by(rank), e); })) tokens.push_back(t);
  }
  return tokens;
}

TEST_P(Plans, hold_every_expert_on_one_rank) {
  for_each_plan([](const Context&, const Workload& w, const Plan& plan, const Ids&, std::int64_t) {
    std::int64_t next = 0;
    for (int rank = 0; rank < w.ranks; ++rank) {
      require_equal(plan.held_by(rank).first, next, "first expert of a rank");
      next += plan.held_by(rank).count;
      if (!w.first_experts.empty()) continue;
      for (std::int64_t e = plan.held_by(rank).first; e < next; ++e)
        require_equal(owner_of(e, w.ranks, w.experts), rank, "owner of an expert");
    }
    require_equal(next, w.experts, "experts");
  });
}

TEST_P(Plans, count_the_rows_of_every_rank_for_every_expert) {
  for_each_plan([](const Context&, const Workload& w, const Plan& plan, const Ids& ids, std::int64_t) {
    for (std::int64_t e = 0; e < w.experts; ++e) {
      for (int rank = 0; rank < w.ranks; ++rank)
        require_equal(std::int64_t{plan.counts()[at(rank * w.experts + e)]}, rows_of(ids, rank, e), "a count");
      require_equal(plan.expert_totals()[at(e)], total(ids, e), "rows of an expert");
    }
  });
}

TEST_P(Plans, begin_each_local_expert_at_a_multiple_of_the_alignment) {
  for_each_plan([](const Context&, const Workload&, const Plan& plan, const Ids& ids, std::int64_t alignment) {
    const ExpertRange local = plan.local();
    std::int64_t end = 0;
    for (std::int64_t e = 0; e < local.count; ++e) {
      require_equal(plan.offsets()[at(e)], first_row(plan, ids, local.first + e, alignment), "an offset");
      require_equal(plan.rows()[at(e)], total(ids, local.first + e), "rows of a local expert");
      end = plan.offsets()[at(e)] + (plan.rows()[at(e)] + alignment - 1) / alignment * alignment;
    }
    require_equal(plan.received(), end, "all rows");
  });
}

TEST_P(Plans, place_every_slot_in_the_global_order_of_its_experts_rows) {
  for_each_plan(
      [](const Context& context, const Workload& w, const Plan& plan, const Ids& ids, std::int64_t alignment) {
        std::vector<std::int64_t> next;
        for (std::int64_t e = 0; e < w.experts; ++e) {
          next.push_back(first_row(plan, ids, e, alignment));
          for (int rank = 0; rank < context.rank(); ++rank) next.back() += rows_of(ids, rank, e);
          require_equal(plan.data().slot_start_of(e), next.back(), "this rank's first row of an expert");
        }
        const auto& own = ids[at(context.rank())];
        for (std::size_t i = 0; i < own.size(); ++i) {
          const SlotRow slot = plan.slots()[i];
          if (own[i] < 0) {
            require_equal(slot.rank, -1, "rank of a slot that goes nowhere");
            continue;
          }
          require(is_in(plan.held_by(slot.rank), own[i]), "the owner of the slot's expert");
          require_equal(std::int64_t{slot.row}, next[at(own[i])]++, "row of a slot");
        }
        for (std::int64_t e = 0; e < plan.local().count; ++e) {
          std::int64_t row = plan.offsets()[at(e)];
          for (int source = 0; source < w.ranks; ++source) {
            require_equal(plan.data().source_start_of(source, e), row, "first row of a source");
            row += rows_of(ids, source, plan.local().first + e);
          }
        }
      });
}

TEST_P(Plans, send_each_token_once_to_each_other_rank_that_needs_it) {
  for_each_plan([](const Context& context, const Workload& w, const Plan& plan, const Ids& ids, std::int64_t) {
    std::int64_t sent = 0, received = 0;
    for (int peer = 0; peer < w.ranks; ++peer) {
      const auto wanted = tokens_for(plan, w, ids, context.rank(), peer);
      require(std::ranges::equal(plan.sends(peer), wanted), "tokens for a rank");
      sent += static_cast<std::int64_t>(wanted.size());
      std::int64_t before = 0;
      for (int source = 0; source < context.rank(); ++source)
        before += static_cast<std::int64_t>(tokens_for(plan, w, ids, source, peer).size());
      if (peer != context.rank()) require_equal(plan.send_row(peer), before, "first inbox row at a rank");
      require_equal(plan.sources()[at(peer)], received, "first inbox row of a source");
      received += static_cast<std::int64_t>(tokens_for(plan, w, ids, peer, context.rank()).size());
    }
    require_equal(plan.unique(), received, "inbox rows");
    require_equal(plan.sent_bytes(w.hidden, DType::bf16), sent * w.hidden * 2, "bytes");
  });
}

INSTANTIATE_TEST_SUITE_P(Ways, Plans, testing::ValuesIn(every_way()), way_name);

}  // namespace
}  // namespace expar::test
