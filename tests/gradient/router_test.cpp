// The router's backward pass against finite differences.
#include <gtest/gtest.h>

#include <algorithm>

#include <expar/random.h>
#include <expar/registry.h>
#include <expar/router.h>

#include "tests/fastest_backend.h"
#include "tests/gradient/differences.h"

namespace expar::test {
namespace {

constexpr std::int64_t kTokens = 9, kExperts = 7, kTopk = 3;
const std::vector<std::int64_t> kShards{0, 4, 4, 9};

std::vector<std::int64_t> counts_of(const Routing& routing) {
  std::vector<std::int64_t> counts(kExperts);
  for (std::int64_t i = 0; i < routing.ids.elements(); ++i)
    if (const std::int32_t id = routing.ids.as<std::int32_t>()[i]; id >= 0) ++counts[static_cast<std::size_t>(id)];
  return counts;
}

const std::vector<std::int64_t> kSequences{0, 2, 2, 6, 9};

void check(const Context& context, const RouterOptions& options, const RouteInputs& inputs) {
  const std::int64_t slots = slots_of(options);
  const Random random(3, "router");
  Array logits(DType::f32, {kTokens, kExperts});
  Array dweights(DType::f32, {kTokens, slots});
  for (std::int64_t i = 0; i < kTokens * kExperts; ++i)
    logits.as<float>()[i] = 1.5F * random.normal(static_cast<std::uint64_t>(i));
  for (std::int64_t i = 0; i < kTokens * slots; ++i)
    dweights.as<float>()[i] = random.normal(static_cast<std::uint64_t>(1000 + i));

  Routing routing;
  route(context, options, logits, routing, inputs);
  const std::vector<std::int64_t> counts = counts_of(routing);
  const std::vector<std::int32_t> ids(routing.ids.as<std::int32_t>(), routing.ids.as<std::int32_t>() + kTokens * slots);
  const LossInputs sequences{.sequences = kSequences};
  const RouterLosses losses = router_losses(context, options, routing, counts, kShards, sequences);
  Array dlogits(DType::f32, {kTokens, kExperts});
  route_backward(context, options, routing, losses, dweights, dlogits);

  Routing other;
  const auto loss = [&] {
    route(context, options, logits, other, inputs);
    // A step must not change who is chosen: there the function jumps.
    EXPECT_TRUE(std::equal(ids.begin(), ids.end(), other.ids.as<std::int32_t>()));
    const RouterLosses now = router_losses(context, options, other, counts, kShards, sequences);
    double sum = static_cast<double>(now.balance) + now.z;
    for (const float more : {now.sequence_balance, now.importance, now.importance_cv, now.load}) sum += more;
    for (std::int64_t i = 0; i < kTokens * slots; ++i)
      sum += static_cast<double>(other.weights.as<float>()[i]) * dweights.as<float>()[i];
    return sum;
  };
  std::vector<double> differences;
  for (std::int64_t i = 0; i < kTokens * kExperts; ++i)
    differences.push_back(derivative(logits.as<float>()[i], 0.004, loss));
  expect_gradient("dlogits", differences, dlogits.as<float>(), 2e-3);
}

void check(const RouterOptions& options, const RouteInputs& inputs = {}) {
  run_threads(1, [&](const Communicator& communicator) {
    check(Context(communicator, {.threads = 1, .backend = fastest_backend()}), options, inputs);
  });
}

TEST(RouterGradient, goes_through_renormalised_scores) { check({.experts = kExperts, .topk = kTopk}); }
TEST(RouterGradient, goes_through_plain_scores) { check({.experts = kExperts, .topk = kTopk, .renormalise = false}); }
TEST(RouterGradient, counts_the_balancing_loss) {
  check({.experts = kExperts, .topk = kTopk, .balance = 20.0F});
  check({.experts = kExperts, .topk = kTopk, .renormalise = false, .balance = 20.0F});
}
TEST(RouterGradient, counts_the_z_loss) {
  check({.experts = kExperts, .topk = kTopk, .z = 2.0F});
  check({.experts = kExperts, .topk = kTopk, .renormalise = false, .z = 2.0F});
}

TEST(RouterGradient, counts_the_balancing_loss_of_each_sequence) {
  check({.experts = kExperts, .topk = kTopk, .sequence_balance = 20.0F});
  check({.experts = kExperts, .topk = kTopk, .score = Score::sigmoid, .balance = 10.0F, .sequence_balance = 20.0F});
}
TEST(RouterGradient, counts_the_importances) {
  check({.experts = kExperts, .topk = kTopk, .importance = 50.0F});
  check({.experts = kExperts, .topk = kTopk, .importance_cv = 20.0F});
  check({.experts = kExperts, .topk = kTopk, .score = Score::sigmoid, .importance = 50.0F, .importance_cv = 20.0F});
}
TEST(RouterGradient, counts_the_loads) {
  check({.experts = kExperts, .topk = kTopk, .load = 20.0F, .load_deviation = 0.2F});
  check({.experts = kExperts, .topk = kTopk, .sequence_balance = 9.0F, .load = 9.0F, .load_deviation = 0.1F});
}

/// One segment has no tokens and one ends where the library's tasks do not.
TEST(RouterGradient, counts_for_each_token_the_loss_of_its_segment) {
  run_threads(1, [&](const Communicator& communicator) {
    constexpr std::int64_t kMany = 600, kE = 3;
    const Context context(communicator, {.threads = 2, .backend = fastest_backend()});
    const RouterOptions options{.experts = kE, .topk = 1};
    const Random random(4, "segments");
    Array logits(DType::f32, {kMany, kE});
    for (std::int64_t i = 0; i < kMany * kE; ++i) logits.as<float>()[i] = random.normal(static_cast<std::uint64_t>(i));
    Routing routing;
    route(context, options, logits, routing);
    RouterLosses losses;
    losses.segments = {0, 1, 1, 300, kMany};
    for (int i = 0; i < 4 * kE; ++i) losses.dscores.push_back(random.normal(static_cast<std::uint64_t>(10000 + i)));
    const Array none(DType::f32, {kMany, 1});
    Array dlogits(DType::f32, {kMany, kE});
    route_backward(context, options, routing, losses, none, dlogits);
    for (std::int64_t t = 0; t < kMany; ++t) {
      const float* row = losses.dscores.data() + (t < 1 ? 0 : t < 300 ? 2 : 3) * kE;
      const float* score = routing.scores.as<float>() + t * kE;
      const double mean = static_cast<double>(score[0]) * row[0] + static_cast<double>(score[1]) * row[1] +
                          static_cast<double>(score[2]) * row[2];
      for (std::int64_t e = 0; e < kE; ++e)
        EXPECT_NEAR(dlogits.as<float>()[t * kE + e], score[e] * (row[e] - mean), 1e-6) << t;
    }
  });
}

TEST(RouterGradient, goes_through_every_score) {
  for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
    for (const bool wide : {false, true}) {
      const bool renormalised = score != Score::sigmoid || !wide;
      check({.experts = kExperts,
             .topk = kTopk,
             .score = score,
             .renormalise = renormalised,
             .scaling = 2.5F,
             .double_scores = wide});
      check({.experts = kExperts, .topk = kTopk, .score = score, .double_scores = wide, .balance = 4.0F});
      check({.experts = kExperts, .topk = kTopk, .score = score, .double_scores = wide, .z = 0.5F});
    }
  }
}

TEST(RouterGradient, of_one_renormalised_expert_is_none) {
  run_threads(1, [](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    const float logits[] = {1, 3, 0, 2};
    const float one = 1.0F;
    for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
      const RouterOptions options{.experts = 4, .topk = 1, .score = score};
      Routing routing;
      route(context, options, ConstTensor(logits, {1, 4}), routing);
      EXPECT_EQ(routing.weights.as<float>()[0], 1.0F);
      Array dlogits(DType::f32, {1, 4});
      route_backward(context, options, routing, {}, ConstTensor(&one, {1, 1}), dlogits);
      for (int e = 0; e < 4; ++e) EXPECT_EQ(dlogits.as<float>()[e], 0.0F) << e;
    }
  });
}

TEST(RouterGradient, passes_by_the_selection_bias) {
  const float bias[kExperts] = {5, 0, 4, 0, 0, 0, 3};  // so large that no step changes the choice
  for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
    check({.experts = kExperts, .topk = kTopk, .score = score, .selection_bias = true, .balance = 20.0F, .z = 0.5F},
          {.selection_bias = ConstTensor(bias, {kExperts})});
  }
}

TEST(RouterGradient, is_of_given_routes_as_of_chosen_ones) {
  // A token without experts, one with an expert twice, one with fewer than K.
  std::int32_t ids[kTokens * kTopk];
  for (std::int32_t i = 0; i < kTokens * kTopk; ++i) ids[i] = i % kExperts;
  ids[0] = ids[1] = ids[2] = ids[5] = -1;
  ids[6] = ids[7] = 4;
  for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
    for (const bool renormalise : {false, true}) {
      check({.experts = kExperts, .topk = kTopk, .score = score, .renormalise = renormalise, .balance = 20.0F},
            {.ids = ConstTensor(ids, {kTokens, kTopk})});
    }
  }
}

TEST(RouterGradient, is_of_what_the_whole_batch_chose) {
  for (const Choice choice : {Choice::sinkhorn, Choice::experts}) {
    for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
      for (const bool renormalise : {false, true}) {
        check({.experts = kExperts,
               .topk = kTopk,
               .score = score,
               .choice = choice,
               .renormalise = renormalise,
               .scaling = 1.5F,
               .z = 0.5F});
      }
    }
  }
}

TEST(RouterGradient, is_zero_where_there_is_padding) {
  const std::int8_t mask[kTokens] = {1, 0, 1, 1, 0, 0, 1, 1, 0};
  for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
    check({.experts = kExperts, .topk = kTopk, .score = score, .balance = 20.0F, .z = 0.5F},
          {.mask = ConstTensor(mask, {kTokens})});
  }
}

}  // namespace
}  // namespace expar::test
