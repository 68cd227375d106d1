// The planner beside counting that anyone can follow: every choice, every message of a ring.
#include <algorithm>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include <expar/expar.h>
#include <gtest/gtest.h>

#include "planner/ascend.h"
#include "planner/planner.h"
#include "tests/unit/planner_testing.h"

namespace expar::planner {
namespace {

const Traffic& of(const Answer& answer, const std::string& key) {
  for (const Way& way : answer.ways) {
    if (way.key == key) return way.traffic;
  }
  throw Error(ErrorCode::internal, "no way is called " + key);
}

/// What is sent, message by message.
class Wire {
 public:
  explicit Wire(const Grid& grid) : grid_(grid) {}
  void send(int from, int to, double bytes) {
    if (from == to) return;
    (grid_.node(from) == grid_.node(to) ? sent_.within_node : sent_.between_nodes) += bytes;
  }
  void expect(const Traffic& planned, const char* what) const {
    EXPECT_DOUBLE_EQ(planned.within_node, sent_.within_node) << what;
    EXPECT_DOUBLE_EQ(planned.between_nodes, sent_.between_nodes) << what;
  }

 private:
  const Grid& grid_;
  Traffic sent_;
};

constexpr double kElement = 2;  // bf16

/// Coordinates of rank r in a grid of dims dp, ep, tp in this order.
struct Place {
  int dp, ep, tp;
};
Place place_of(const Grid& grid, int rank) {
  const int tp = grid.size("tp");
  const int ep = grid.size("ep");
  return {rank / (ep * tp), rank / tp % ep, rank % tp};
}

/// Sends every row of every way on its own, and compares.
void expect_counted(const Question& question) {
  const Answer answer = plan(question);
  const Grid& grid = question.grid;
  const LayerSizes& sizes = question.sizes;
  const int tp = grid.size("tp");
  const int ep = grid.size("ep");
  const int group = ep * tp;  // ranks with other tokens and other experts
  const double row = kElement * static_cast<double>(sizes.hidden);
  Wire dispatch(grid), combine(grid), slots(grid), hidden(grid), both(grid);
  for (int rank = 0; rank < grid.ranks(); ++rank) {
    const int first = rank / group * group;
    const Place here = place_of(grid, rank);
    for (std::int64_t t = 0; t < question.tokens; ++t) {
      const std::int64_t token = rank * question.tokens + t;
      std::set<int> owners, owners_along_ep;
      for (std::int64_t k = 0; k < sizes.topk; ++k) {
        const std::int32_t id = question.ids[static_cast<std::size_t>(token * sizes.topk + k)];
        const int owner = first + owner_of(id, group, sizes.experts);
        const int along_ep = owner_of(id, ep, sizes.experts);
        owners.insert(owner);
        owners_along_ep.insert(along_ep);
        combine.send(owner, rank, row);
        slots.send(rank, owner, row);
        slots.send(owner, rank, row);
        for (int taker = 0; taker < group; ++taker) {
          hidden.send(owner, first + taker,
                      kElement * static_cast<double>(experts_of(taker, group, sizes.hidden).count));
        }
        // Every rank along tp has the token by then, and has its own part of the expert's result.
        for (int side = 0; side < tp; ++side) {
          both.send((here.dp * ep + along_ep) * tp + side, (here.dp * ep + here.ep) * tp + side, row);
        }
      }
      for (const int owner : owners) dispatch.send(rank, owner, row);
      for (const int along_ep : owners_along_ep) {
        for (int side = 0; side < tp; ++side) {
          both.send((here.dp * ep + here.ep) * tp + side, (here.dp * ep + along_ep) * tp + side, row);
        }
      }
      // All-gather and reduce-scatter along tp, as rings: each row makes tp - 1 steps in each.
      for (int step = 0; step + 1 < tp; ++step) {
        const int line = rank - here.tp;
        const int from = line + (here.tp + step) % tp;
        const int to = line + (here.tp + step + 1) % tp;
        both.send(from, to, 2 * row);
      }
    }
  }
  dispatch.expect(answer.dispatch, "dispatch");
  combine.expect(answer.combine, "combine");
  slots.expect(of(answer, "ep_per_slot"), "ep_per_slot");
  hidden.expect(of(answer, "hidden"), "hidden");
  if (ep > 1 && tp > 1) both.expect(of(answer, "etp"), "etp");
  EXPECT_DOUBLE_EQ(of(answer, "ep").bytes(), answer.dispatch.bytes() + answer.combine.bytes());
}

TEST(Planner, counts_given_routes_as_sending_every_row_does) {
  for (const int ranks_per_node : {0, 1, 2, 3}) {
    for (const std::vector<MeshDim>& dims : {std::vector<MeshDim>{{"ep", 1}},
                                             {{"ep", 4}},
                                             {{"ep", 7}},
                                             {{"tp", 3}},
                                             {{"ep", 2}, {"tp", 2}},
                                             {{"dp", 2}, {"ep", 3}},
                                             {{"dp", 2}, {"ep", 3}, {"tp", 2}},
                                             {{"ep", 16}}}) {
      Question question = question_of(dims, ranks_per_node, 11, 3);
      draw_ids(question);
      SCOPED_TRACE(testing::Message() << question.grid.ranks() << " ranks, " << ranks_per_node << " on a node");
      expect_counted(question);
    }
  }
}

/// Calls see with every choice of K experts out of E.
template <class See>
void for_every_choice(std::int64_t experts, std::int64_t topk, std::vector<std::int32_t>& chosen, See see) {
  if (static_cast<std::int64_t>(chosen.size()) == topk) return see();
  for (std::int32_t e = chosen.empty() ? 0 : chosen.back() + 1; e < experts; ++e) {
    chosen.push_back(e);
    for_every_choice(experts, topk, chosen, see);
    chosen.pop_back();
  }
}

TEST(Planner, expects_the_mean_over_all_choices_that_there_are) {
  // Of experts that ranks share evenly, unevenly, and of fewer experts than ranks.
  for (const std::int64_t experts : {8, 7, 5, 3}) {
    for (std::int64_t topk = 1; topk <= experts; ++topk) {
      const Question question = question_of({{"ep", 4}}, 3, experts, topk, 6);
      std::vector<std::int32_t> chosen, all;
      for_every_choice(experts, topk, chosen, [&] { all.insert(all.end(), chosen.begin(), chosen.end()); });
      const auto choices = static_cast<std::int64_t>(all.size()) / topk;
      Question every = question;
      every.tokens = choices;
      for (int rank = 0; rank < 4; ++rank) every.ids.insert(every.ids.end(), all.begin(), all.end());

      const Answer expected = plan(question);
      const Answer counted = plan(every);
      const double share = 6.0 / static_cast<double>(choices);
      ASSERT_EQ(expected.ways.size(), counted.ways.size());
      for (std::size_t i = 0; i < expected.ways.size(); ++i) {
        SCOPED_TRACE(testing::Message() << expected.ways[i].key << ", " << topk << " of " << experts);
        const Traffic& mean = counted.ways[i].traffic;
        EXPECT_NEAR(expected.ways[i].traffic.within_node, mean.within_node * share, 1e-9);
        EXPECT_NEAR(expected.ways[i].traffic.between_nodes, mean.between_nodes * share, 1e-9);
      }
    }
  }
}

TEST(Planner, says_what_the_rings_of_tensor_parallelism_pass_on) {
  for (const int ranks : {1, 2, 5, 8}) {
    for (const int ranks_per_node : {0, 2, 3}) {
      const Question question = question_of({{"tp", ranks}}, ranks_per_node, 4, 2);
      Wire all_reduce(question.grid), gather(question.grid);
      const double piece = 5 * 10 * kElement;  // of the group's tokens: those of one rank
      for (int pass = 0; pass < 2; ++pass) {
        for (int step = 0; step + 1 < ranks; ++step) {
          for (int rank = 0; rank < ranks; ++rank) all_reduce.send(rank, (rank + 1) % ranks, piece);
        }
      }
      for (int owner = 0; owner < ranks; ++owner) {
        const double slice = static_cast<double>(experts_of(owner, ranks, 10).count) * 5 * ranks * kElement;
        for (int step = 0; step + 1 < ranks; ++step) {
          gather.send((owner + step) % ranks, (owner + step + 1) % ranks, slice);
        }
      }
      const Answer answer = plan(question);
      all_reduce.expect(of(answer, "tp"), "tp");
      all_reduce.expect(of(answer, "allgather_reducescatter"), "allgather_reducescatter");
      gather.expect(of(answer, "hidden_allgather"), "hidden_allgather");
      EXPECT_EQ(of(answer, "tp").bytes(), 2.0 * (ranks - 1) * 5 * 10 * kElement * ranks) << "2 (P - 1) T H elements";
    }
  }
}

TEST(Planner, counts_the_slices_that_ranks_with_the_same_tokens_read) {
  for (const int ranks : {1, 2, 3, 4}) {
    Question question = question_of({{"ep", ranks}}, 0, 7, 3);
    draw_ids(question);
    std::vector<std::int64_t> read(static_cast<std::size_t>(ranks), 0);
    run_threads(ranks, [&](const Communicator& communicator) {
      const Context context(communicator);
      const ConstTensor ids(question.ids.data(), Shape{ranks * question.tokens, 3});
      const Plan made = make_replicated_plan(context, ids, {.experts = 7});
      const Part part = part_of(question.sizes.hidden, context.rank(), ranks);
      for (const SlotRow& slot : made.slots()) {
        if (slot.rank != context.rank()) read[static_cast<std::size_t>(context.rank())] += 2 * (part.end - part.begin);
      }
    });
    EXPECT_EQ(of(plan(question), "hidden").bytes(), std::accumulate(read.begin(), read.end(), 0.0)) << ranks;
  }
}

TEST(Planner, finds_the_crossover_of_the_notebook) {
  // 128 tokens on 32 ranks, 32 experts, EP = 8 against TP = 8: 16 h topk (P - 1) / P bytes against 128 h (P - 1) / P.
  Question question = question_of({{"dp", 4}, {"ep", 8}}, 8, 32, 4, 4);
  const Answer answer = plan(question);
  EXPECT_EQ(of(answer, "ep_per_slot").bytes() / 32, 16.0 * 10 * 4 * 7 / 8);
  EXPECT_EQ(of(answer, "tp").bytes() / 32, 128.0 * 10 * 7 / 8);
  EXPECT_EQ(answer.crossover, 8);
  EXPECT_EQ(of(answer, "ep").between_nodes, 0);
}

TEST(Planner, finds_the_crossovers_that_trying_every_top_k_finds) {
  for (const int ranks : {2, 3, 4, 6, 8, 13}) {
    for (const std::int64_t experts : {5, 8, 12, 16, 23}) {
      const Question question = question_of({{"ep", ranks}}, 0, experts, 1);
      const double tp = of(plan(question), "tp").bytes();
      std::optional<std::int64_t> per_slot, once;
      for (std::int64_t topk = experts; topk >= 1; --topk) {
        const CurvePoint point = curve(question, {topk}).front();
        // Even choices give fractions whose sums need not be exact.
        if (point.ep_per_slot >= tp * (1 - 1e-12)) per_slot = topk;
        if (point.ep >= tp) once = topk;
      }
      const Answer answer = plan(question);
      EXPECT_EQ(answer.crossover, per_slot) << ranks << " ranks, " << experts << " experts";
      EXPECT_EQ(answer.crossover_once, once) << ranks << " ranks, " << experts << " experts";
      EXPECT_EQ(answer.crossover, ranks <= experts ? std::optional<std::int64_t>(ranks) : std::nullopt);
    }
  }
}

TEST(Planner, has_no_crossover_where_nothing_travels) {
  const Answer answer = plan(question_of({{"ep", 1}}, 0, 8, 2));
  EXPECT_FALSE(answer.crossover);
  EXPECT_FALSE(answer.crossover_once);
  for (const Way& way : answer.ways) EXPECT_EQ(way.traffic.bytes(), 0) << way.key;
}

TEST(Planner, extrapolates_the_crossover_of_given_routes_from_all_their_slots) {
  Question question = question_of({{"ep", 3}}, 0, 9, 2, 2);
  // Ranks hold experts 0-2, 3-5, 6-8. Of 12 slots 5 leave their rank: K 5 / 12 of 6 tokens' rows against 2 for each.
  question.ids = {0, 1, 0, 3, /* rank 1 */ 3, 4, 0, 5, /* rank 2 */ 6, 0, 1, 2};
  EXPECT_EQ(plan(question).crossover, 5) << "K 5 / 12 >= 2";
}

TEST(Planner, puts_ranks_together_as_a_mesh_does) {
  const std::vector<MeshDim> dims = {{"tp", 2}, {"dp", 2}, {"ep", 3}};
  const Grid grid(dims, 5);
  EXPECT_EQ(grid.ranks(), 12);
  EXPECT_EQ(grid.nodes(), 3);
  EXPECT_EQ(grid.node(9), 1);
  run_threads(12, [&](const Communicator& communicator) {
    const Mesh mesh(communicator, dims);
    for (const std::vector<std::string>& along : {std::vector<std::string>{"tp"}, {"ep"}, {"ep", "tp"}}) {
      const Communicator group = mesh.join(along);
      const auto groups = grid.groups({along.begin(), along.end()});
      const auto mine = std::find_if(groups.begin(), groups.end(), [&](const std::vector<int>& ranks) {
        return std::find(ranks.begin(), ranks.end(), communicator.rank()) != ranks.end();
      });
      ASSERT_NE(mine, groups.end());
      ASSERT_EQ(static_cast<int>(mine->size()), group.size());
      EXPECT_EQ((*mine)[static_cast<std::size_t>(group.rank())], communicator.rank());
    }
  });
}

template <class Run>
std::string refusal(Run run) {
  try {
    run();
  } catch (const Error& error) {
    return std::string(name(error.code())) + ": " + error.message();
  }
  return "accepted";
}

TEST(Planner, refuses_what_cannot_be_with_a_sentence) {
  EXPECT_EQ(refusal([] { plan(question_of({{"ep", 2}}, 0, 3, 4)); }), "bad_argument: topk 4 is above the 3 experts");
  EXPECT_EQ(refusal([] { plan(question_of({{"ep", 2}}, 0, 3, 0)); }), "bad_argument: topk is 0, must be at least 1");
  Question question = question_of({{"ep", 2}}, 0, 3, 1, 1);
  question.ids = {0};
  EXPECT_EQ(refusal([&] { plan(question); }), "bad_argument: there are 1 ids for 2 slots");
  question.ids = {0, 3};
  EXPECT_EQ(refusal([&] { plan(question); }), "bad_argument: expert 3 of the routes is none of the 3");
  EXPECT_EQ(refusal([] { Grid({{"pp", 2}}, 0); }), "bad_argument: a mesh to plan has the dims dp, ep and tp, not 'pp'");
  EXPECT_EQ(refusal([] { Grid({{"ep", 2}, {"ep", 2}}, 0); }), "bad_argument: the mesh names dim ep twice");
  EXPECT_EQ(refusal([] { Grid({{"ep", 64}, {"tp", 17}}, 0); }), "bad_argument: the mesh has more than 1024 ranks");
}

TEST(Planner, says_what_ascends_operators_refuse) {
  ascend::Domain domain{.ep_world_size = 8, .moe_expert_num = 256};
  EXPECT_TRUE(ascend_refusals({.domain = domain, .tokens = 512, .hidden = 7168, .topk = 8}).empty());
  domain.ep_world_size = 3;
  EXPECT_EQ(ascend_refusals({.domain = domain, .tokens = 513, .hidden = 1023, .topk = 17}),
            (std::vector<std::string>{
                "moe_expert_num is 256, should be a multiple of ep_world_size - shared_expert_rank_num, 3",
                "BS is 513, should be from 1 to 512", "H is 1023, should be from 1024 to 8192",
                "K is 17, should be from 1 to 16"}));
}

}  // namespace
}  // namespace expar::planner
