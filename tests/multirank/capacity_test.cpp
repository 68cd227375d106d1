// Bounded rows against plain loops over the global batch, on any number of ranks; and what a dropped slot means for
// combine and the gradients.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include <expar/capacity.h>
#include <expar/collectives.h>
#include <expar/dispatch.h>

#include "tests/multirank/capacity_oracle.h"
#include "tests/multirank/processes.h"
#include "tests/unit/router_oracle.h"

namespace expar::test {
namespace {

using oracle::at;
using oracle::Batch;
using Policy = CapacityPolicy;
using Scope = CapacityScope;

constexpr int kRanks[] = {1, 2, 3, 4, 7, 8};

/// Uneven, and none on rank 1 of several.
std::int64_t first_token(const Batch& batch, int rank, int ranks) {
  if (rank == 2 && ranks > 2) return first_token(batch, 1, ranks);
  return batch.tokens * rank * rank / ranks / ranks;
}

/// This rank's part of a batch, as route() would leave it.
struct Share {
  Share(const Batch& all, int rank, int ranks)
      : begin(first_token(all, rank, ranks)), batch(all, begin, first_token(all, rank + 1, ranks)) {
    routing.ids = Tensor(batch.ids.data(), {batch.tokens, batch.topk});
    routing.valid = batch.tokens;
    routing.weights = Tensor(batch.weights.data(), {batch.tokens, batch.topk});
    routing.top = Tensor(batch.top.data(), {batch.tokens, batch.topk});
    routing.choice_scores = Tensor(batch.scores.data(), {batch.tokens, batch.experts});
  }
  std::int64_t begin;
  Batch batch;
  Routing routing;
};

/// What the policy should leave of the whole batch on these ranks.
std::vector<std::int32_t> expected_ids(const Batch& all, const CapacityOptions& options, int ranks) {
  if (options.scope == Scope::global) return oracle::bounded(all, options);
  std::vector<std::int32_t> ids;
  for (int rank = 0; rank < ranks; ++rank) {
    const auto part = oracle::bounded(Share(all, rank, ranks).batch, options);
    ids.insert(ids.end(), part.begin(), part.end());
  }
  return ids;
}

void check_share(const Context& context, const Batch& all, const CapacityOptions& options,
                 const std::vector<std::int32_t>& expected, Capacity& capacity) {
  const Share share(all, context.rank(), context.size());
  bound_rows(context, options, all.experts, share.routing.ids, share.routing, capacity);

  const std::size_t slots = share.batch.ids.size();
  const auto* mine = expected.data() + share.begin * all.topk;
  for (std::size_t i = 0; i < slots; ++i) {
    ASSERT_EQ(capacity.ids.as<std::int32_t>()[i], mine[i]) << "slot " << i << " of rank " << context.rank();
    if (options.policy == Policy::reroute) continue;
    ASSERT_EQ(capacity.weights.as<float>()[i], mine[i] < 0 ? 0.0F : share.batch.weights[i]);
    if (options.policy != Policy::overflow) continue;
    ASSERT_EQ(capacity.overflow_ids.as<std::int32_t>()[i], mine[i] < 0 ? share.batch.ids[i] : -1);
  }

  std::vector<std::int64_t> chosen(at(all.experts)), lost(chosen), moved(chosen);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const std::int32_t id = all.ids[i];
    if (id < 0) continue;
    ++chosen[at(id)];
    lost[at(id)] += expected[i] < 0;
    moved[at(id)] += expected[i] >= 0 && expected[i] != id;
  }
  const bool kept = options.policy == Policy::overflow;
  EXPECT_EQ(capacity.chosen, chosen);
  EXPECT_EQ(capacity.dropped, kept ? std::vector<std::int64_t>(chosen.size()) : lost);
  EXPECT_EQ(capacity.overflowed, kept ? lost : std::vector<std::int64_t>(chosen.size()));
  EXPECT_EQ(capacity.rerouted, moved);
  EXPECT_EQ(capacity.rows, oracle::rows_of(options.scope == Scope::global ? all : share.batch, options));
}

std::vector<Batch> batches() {
  return {Batch(1, 1, 1, 1),  Batch(37, 5, 2, 2),        Batch(64, 8, 3, 3, true),       Batch(100, 3, 1, 4),
          Batch(90, 7, 7, 5), Batch(41, 16, 4, 6, true), Batch(77, 6, 3, 7, true, true), Batch(0, 4, 2, 8)};
}

void compare(const RankSetup& setup, Policy policy, Scope scope) {
  std::vector<CapacityOptions> bounds;
  for (const double factor : {0.4, 1.0, 3.0}) bounds.push_back({policy, scope, factor, 0});
  bounds.push_back({policy, scope, 0, 9});
  const std::vector<Batch> all = batches();
  expect_success(run_communicators(setup, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = "reference"});
    Capacity capacity;
    for (const Batch& batch : all)
      for (const CapacityOptions& options : bounds)
        check_share(context, batch, options, expected_ids(batch, options, setup.ranks), capacity);
  }));
}

class CapacityOf : public testing::TestWithParam<Policy> {};
INSTANTIATE_TEST_SUITE_P(all, CapacityOf,
                         testing::Values(Policy::drop_by_position, Policy::drop_by_score, Policy::reroute,
                                         Policy::overflow),
                         [](const auto& test) { return std::string(name(test.param)); });

TEST_P(CapacityOf, keeps_of_the_global_batch_what_a_plain_loop_keeps) {
  for (const int ranks : kRanks) compare({.ranks = ranks}, GetParam(), Scope::global);
}
TEST_P(CapacityOf, keeps_of_each_rank_what_a_plain_loop_keeps) {
  for (const int ranks : kRanks) compare({.ranks = ranks}, GetParam(), Scope::per_rank);
}
TEST_P(CapacityOf, is_the_same_where_ranks_send_messages) {
  for (const Scope scope : {Scope::global, Scope::per_rank})
    compare({.kind = Kind::shm, .ranks = 3, .mapping = false}, GetParam(), scope);
}

/// Logits of a skewed batch; with `large` ones a sigmoid rounds to 1 and tells nothing.
std::vector<float> skewed_logits(std::int64_t count, std::int64_t experts, float large) {
  const Random random(4, "logits");
  std::vector<float> logits;
  for (std::int64_t i = 0; i < count; ++i)
    logits.push_back(large + random.normal(static_cast<std::uint64_t>(i)) + (i % experts < 3 ? 2.5F : 0.0F));
  return logits;
}

TEST(Capacity, re_routes_to_what_the_router_would_have_chosen_next) {
  constexpr std::int64_t kTokens = 80, kExperts = 12, kTopk = 2;
  const std::vector<float> bias{0, 0.4F, 0, 0.9F, 0, 0, 0.2F, 0, 1.1F, 0, 0.3F, 0};
  const RouterOptions routers[] = {
      {.score = Score::sigmoid, .groups = 4, .groups_used = 2, .selection_bias = true},
      {.score = Score::softmax, .groups = 3, .groups_used = 1},
      {.score = Score::softmax, .selection_bias = true},
      {.score = Score::sigmoid, .choice = Choice::logits},
      {.score = Score::sqrt_softplus, .double_scores = true},
  };
  for (RouterOptions router : routers) {
    router.experts = kExperts;
    router.topk = kTopk;
    const std::vector<float> logits =
        skewed_logits(kTokens * kExperts, kExperts, router.choice == Choice::logits ? 20.0F : 0.0F);
    Batch batch;
    batch.tokens = kTokens, batch.experts = kExperts, batch.topk = kTopk;
    for (std::int64_t t = 0; t < kTokens; ++t) {
      const auto row = logits.begin() + t * kExperts;
      const std::vector<double> b(bias.begin(), bias.end());
      const oracle::Route route =
          oracle::route({row, row + kExperts}, router, router.selection_bias ? b : std::vector<double>());
      batch.ids.insert(batch.ids.end(), route.ids.begin(), route.ids.end());
      for (const double value : route.values) batch.scores.push_back(static_cast<float>(value));
    }
    batch.top = batch.weights = std::vector<float>(batch.ids.size());
    const CapacityOptions options{.policy = Policy::reroute, .factor = 1};
    const std::vector<std::int32_t> expected = oracle::bounded(batch, options);
    for (const int ranks : {1, 3}) {
      expect_success(run_communicators({.ranks = ranks}, [&](const Communicator& communicator) {
        const Context context(communicator, {.threads = 1, .backend = "reference"});
        const std::int64_t first = first_token(batch, context.rank(), ranks);
        const std::int64_t tokens = first_token(batch, context.rank() + 1, ranks) - first;
        RouteInputs inputs;
        if (router.selection_bias) inputs.selection_bias = ConstTensor(bias.data(), {kExperts});
        Routing routing;
        route(context, router, ConstTensor(logits.data() + first * kExperts, {tokens, kExperts}), routing, inputs);
        Capacity capacity;
        bound_rows(context, options, kExperts, routing.ids, routing, capacity);
        const auto* mine = expected.data() + first * kTopk;
        for (std::int64_t i = 0; i < tokens * kTopk; ++i)
          EXPECT_EQ(capacity.ids.as<std::int32_t>()[i], mine[i]) << "slot " << i << " of rank " << context.rank();
        EXPECT_GT(*std::max_element(capacity.rerouted.begin(), capacity.rerouted.end()), 0);
        const std::int64_t lost = std::accumulate(capacity.dropped.begin(), capacity.dropped.end(), std::int64_t{0});
        EXPECT_EQ(lost > 0, router.groups > 1) << lost;  // some groups have no room for all who want them
      }));
    }
  }
}

TEST(Capacity, is_what_its_formula_says) {
  const Batch batch(10, 4, 2, 1);
  expect_success(run_communicators({.ranks = 2}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = "reference"});
    const Share share(batch, context.rank(), context.size());
    Capacity capacity;
    const auto rows = [&](double factor) {
      bound_rows(context, {.policy = Policy::drop_by_position, .factor = factor}, 4, share.routing.ids, share.routing,
                 capacity);
      return capacity.rows;
    };
    EXPECT_EQ(rows(1.0), 5);   // 10 tokens of 2 slots over 4 experts
    EXPECT_EQ(rows(1.01), 6);  // rounded up
    EXPECT_EQ(rows(0.01), 1);
    EXPECT_EQ(rows(1e300), 20);  // never more than there are slots
  }));
}

TEST(Capacity, without_a_policy_is_the_routers_own_choice) {
  const Batch batch(12, 3, 2, 1, true);
  expect_success(run_communicators({.ranks = 1}, [&](const Communicator& communicator) {
    const Share share(batch, 0, 1);
    Capacity capacity;
    bound_rows(Context(communicator, {.threads = 1, .backend = "reference"}), {}, 3, share.routing.ids, share.routing,
               capacity);
    EXPECT_EQ(capacity.ids.data(), share.routing.ids.data());
    EXPECT_EQ(capacity.weights.data(), share.routing.weights.data());
    EXPECT_EQ(capacity.rows, 0);
  }));
}

// ---- errors

template <class Work>
std::string message_of(ErrorCode code, Work work) {
  try {
    work();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.message();
  }
  return "";
}

TEST(CapacityErrors, tell_every_rank_which_expert_is_given_too_much) {
  const Batch batch(40, 4, 1, 1, true);  // all of them to expert 0
  expect_success(run_communicators({.ranks = 3}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = "reference"});
    const Share share(batch, context.rank(), context.size());
    Capacity capacity;
    const auto bound = [&](Scope scope, std::int64_t rows) {
      return message_of(ErrorCode::bad_argument, [&] {
        bound_rows(context, {.policy = Policy::error, .scope = scope, .rows = rows}, 4, share.routing.ids,
                   share.routing, capacity);
      });
    };
    const std::string advice = ": raise it, or choose a policy that drops or re-routes";
    EXPECT_EQ(bound(Scope::global, 39), "expert 0 is given 40 rows, its capacity is 39" + advice);
    EXPECT_EQ(bound(Scope::global, 40), "");
    EXPECT_EQ(bound(Scope::per_rank, 17), "expert 0 is given 36 rows by rank 2, its capacity is 17" + advice);
    EXPECT_EQ(bound(Scope::per_rank, 36), "");
    const std::vector<std::int32_t>& wanted = share.batch.ids;
    EXPECT_TRUE(std::equal(wanted.begin(), wanted.end(), capacity.ids.as<std::int32_t>()));
  }));
}

TEST(CapacityErrors, of_one_rank_reach_all) {
  const Batch batch(30, 4, 2, 1);
  expect_success(run_communicators({.ranks = 3}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = "reference"});
    const bool wrong = context.rank() == 2;
    const CapacityOptions right{.policy = Policy::reroute, .factor = 1};
    Share share(batch, context.rank(), context.size());
    Capacity capacity;
    const auto bound = [&](const CapacityOptions& options) {
      bound_rows(context, options, 4, share.routing.ids, share.routing, capacity);
    };
    EXPECT_EQ(message_of(ErrorCode::no_memory,
                         [&] {
                           const Error error(ErrorCode::no_memory, "no routing");
                           bound_rows(wrong ? context.declining(error) : context, right, 4, share.routing.ids,
                                      share.routing, capacity);
                         }),
              "no routing");
    const Tensor scores = share.routing.choice_scores;
    if (wrong) share.routing.choice_scores = Tensor();
    EXPECT_EQ(message_of(ErrorCode::bad_argument, [&] { bound(right); }),
              "routing.choice_scores is f32 [], should be f32 [27, 4]");
    share.routing.choice_scores = scores;
    EXPECT_NE(message_of(ErrorCode::mismatch, [&] { bound({.policy = Policy::reroute, .factor = wrong ? 1.5 : 1.0}); }),
              "");
    const std::int32_t id = share.batch.ids.empty() ? 0 : share.batch.ids[1];
    if (wrong) share.batch.ids[1] = 4;
    EXPECT_EQ(message_of(ErrorCode::bad_argument, [&] { bound(right); }),
              "ids[0,1] = 4 is no expert below 4 and not -1");
    if (wrong) share.batch.ids[1] = id;
    bound(right);  // the communicator is still good
  }));
}

TEST(CapacityErrors, name_the_option_that_is_wrong) {
  const auto message = [](const CapacityOptions& options) {
    return message_of(ErrorCode::bad_argument, [&] { validate(options); });
  };
  EXPECT_EQ(message({}), "");
  EXPECT_EQ(message({.policy = Policy::reroute, .factor = 1.25}), "");
  EXPECT_EQ(message({.policy = Policy::reroute, .rows = 7}), "");
  EXPECT_EQ(message({.policy = Policy::reroute}), "a capacity policy needs a factor or rows");
  EXPECT_EQ(message({.factor = 1.25}), "a capacity needs a policy for the rows beyond it");
  EXPECT_EQ(message({.policy = Policy::error, .factor = -1}),
            "the capacity factor is -1.000000, must be a number above 0");
  EXPECT_EQ(message({.policy = Policy::error, .rows = -1}), "the capacity is -1 rows, must be at least 1");
  EXPECT_EQ(message({.policy = Policy::error, .factor = 2, .rows = 3}),
            "a capacity is a factor (2.000000) or rows (3), not both");
}

TEST(CapacityPolicy, is_read_by_its_name) {
  for (const Policy policy : {Policy::none, Policy::drop_by_position, Policy::drop_by_score, Policy::reroute,
                              Policy::overflow, Policy::error}) {
    EXPECT_EQ(parse_capacity_policy(name(policy)), policy);
  }
  EXPECT_EQ(name(Policy::error), "error");
  EXPECT_EQ(message_of(ErrorCode::bad_argument, [] { parse_capacity_policy("drop"); }),
            "capacity policy 'drop' is none of none, drop_by_position, drop_by_score, reroute, overflow, error");
}

// ---- what follows for the tokens

constexpr std::int64_t kHidden = 5;

/// Small whole numbers: sums of them are exact.
Array numbers(std::int64_t first_row, std::int64_t rows, int step) {
  Array values(DType::f32, {rows, kHidden});
  for (std::int64_t i = 0; i < rows * kHidden; ++i)
    values.as<float>()[i] = static_cast<float>((first_row * kHidden + i) * step % 13 - 6);
  return values;
}

/// Each row of the inbox, as an expert that changes nothing gives it back.
void copy_rows(const Inbox& inbox, const Outbox& y) {
  const Rows rows = inbox.expert_rows();
  for (std::int64_t e = 0; e < inbox.plan().local().count; ++e) {
    const std::int64_t first = inbox.plan().offsets()[at(e)];
    for (std::int64_t r = first; r < first + inbox.plan().rows()[at(e)]; ++r) {
      const auto* from = static_cast<const float*>(rows.base[rows.refs[r].base]) + rows.refs[r].row * kHidden;
      std::copy(from, from + kHidden, y.rows().as<float>() + r * kHidden);
    }
  }
}

TEST(Capacity, keeps_the_residual_of_what_it_drops) {
  const Batch batch(60, 4, 2, 9, true);
  for (const int ranks : {1, 3}) {
    expect_success(run_communicators({.ranks = ranks}, [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = "reference"});
      const Share share(batch, context.rank(), context.size());
      const std::int64_t tokens = share.batch.tokens;
      Capacity capacity;
      bound_rows(context, {.policy = Policy::drop_by_score, .factor = 0.5}, 4, share.routing.ids, share.routing,
                 capacity);
      const Array x = numbers(share.begin, tokens, 3), dout = numbers(share.begin, tokens, 5);
      const Array residual = numbers(share.begin, tokens, 7);
      const Array out(DType::f32, x.view().shape()), dx(DType::f32, x.view().shape());
      const Array dweights(DType::f32, {tokens, 2, 1});

      const Plan plan = make_plan(context, capacity.ids, {.experts = 4});
      const Inbox inbox = dispatch(context, x, capacity.weights, plan);
      Outbox y = make_outbox(context, plan, kHidden, DType::f32);
      copy_rows(inbox, y);
      combine(context, plan, y, capacity.weights, out, {.residual = residual});

      // Backwards: y = x, so that dy = weight * dout, dx is their sum, and a weight's gradient is <dout, x>.
      const Inbox gradients = dispatch(context, dout, {}, plan, {.lists_of = &inbox});
      Outbox dy = make_outbox(context, plan, kHidden, DType::f32);
      copy_rows(gradients, dy);
      Outbox products = make_outbox(context, plan, 1, DType::f32);
      for (std::int64_t r = 0; r < plan.received(); ++r) {
        float* row = dy.rows().as<float>() + r * kHidden;
        products.rows().as<float>()[r] = 0;
        for (std::int64_t h = 0; h < kHidden; ++h) {
          products.rows().as<float>()[r] += row[h] * y.rows().as<float>()[r * kHidden + h];
          row[h] *= inbox.weights()[at(r)];
        }
      }
      combine(context, plan, dy, unweighted, dx);
      fetch_slots(context, plan, products, dweights);

      std::int64_t dropped = 0, whole = 0;
      for (std::int64_t t = 0; t < tokens; ++t) {
        float kept = 0;
        float product = 0;
        for (std::int64_t h = 0; h < kHidden; ++h)
          product += x.as<float>()[t * kHidden + h] * dout.as<float>()[t * kHidden + h];
        for (std::int64_t i = 2 * t; i < 2 * t + 2; ++i) {
          const bool stays = capacity.ids.as<std::int32_t>()[i] >= 0;
          if (stays) kept += share.batch.weights[at(i)];
          dropped += !stays;
          EXPECT_EQ(dweights.as<float>()[i], stays ? product : 0.0F);
        }
        whole += kept == 0;
        for (std::int64_t h = 0; h < kHidden; ++h) {
          const std::int64_t i = t * kHidden + h;
          EXPECT_EQ(out.as<float>()[i], x.as<float>()[i] * kept + residual.as<float>()[i]);
          EXPECT_EQ(dx.as<float>()[i], dout.as<float>()[i] * kept);
        }
      }
      if (ranks == 1) {
        EXPECT_GT(whole, 0);  // some tokens lost both slots
        EXPECT_GT(2 * tokens, dropped);
      }
    }));
  }
}

/// For kernels of one's own that take the same number of rows of each expert.
TEST(Capacity, gives_the_same_with_every_expert_padded_to_it) {
  const Batch batch(60, 5, 2, 9);
  expect_success(run_communicators({.ranks = 3}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = "reference"});
    const Share share(batch, context.rank(), context.size());
    Capacity capacity;
    bound_rows(context, {.policy = Policy::drop_by_position, .factor = 0.75}, 5, share.routing.ids, share.routing,
               capacity);
    const Array x = numbers(share.begin, share.batch.tokens, 3);
    const auto through = [&](std::int64_t alignment) {
      Array out(DType::f32, x.view().shape());
      const Plan plan = make_plan(context, capacity.ids, {.experts = 5, .alignment = alignment});
      const Inbox inbox = dispatch(context, x, capacity.weights, plan, {.layout = Layout::expert_major});
      Outbox y = make_outbox(context, plan, kHidden, DType::f32);
      const std::int64_t local = plan.local().count;
      if (alignment > 1) {
        EXPECT_LE(plan.received(), local * capacity.rows);
      }
      // Squares of all rows there are, those between included.
      for (std::int64_t i = 0; i < plan.received() * kHidden; ++i) {
        const float value = inbox.packed().as<float>()[i];
        y.rows().as<float>()[i] = value * value;
      }
      combine(context, plan, y, capacity.weights, out);
      return out;
    };
    const Array plain = through(1);
    const Array padded = through(capacity.rows);
    EXPECT_EQ(std::memcmp(plain.view().data(), padded.view().data(), x.view().byte_size()), 0);
  }));
}

}  // namespace
}  // namespace expar::test
