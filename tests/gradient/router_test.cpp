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
  for (std::int64_t i = 0; i < kTokens * kTopk; ++i)
    ++counts[static_cast<std::size_t>(routing.ids.as<std::int32_t>()[i])];
  return counts;
}

void check(const Context& context, const RouterOptions& options) {
  const Random random(3, "router");
  Array logits(DType::f32, {kTokens, kExperts});
  Array dweights(DType::f32, {kTokens, kTopk});
  for (std::int64_t i = 0; i < kTokens * kExperts; ++i)
    logits.as<float>()[i] = 1.5F * random.normal(static_cast<std::uint64_t>(i));
  for (std::int64_t i = 0; i < kTokens * kTopk; ++i)
    dweights.as<float>()[i] = random.normal(static_cast<std::uint64_t>(1000 + i));

  Routing routing;
  route(context, options, logits, routing);
  const std::vector<std::int64_t> counts = counts_of(routing);
  const std::vector<std::int32_t> ids(routing.ids.as<std::int32_t>(), routing.ids.as<std::int32_t>() + kTokens * kTopk);
  const RouterLosses losses = router_losses(context, options, routing, counts, kShards);
  Array dlogits(DType::f32, {kTokens, kExperts});
  route_backward(context, options, routing, losses, dweights, dlogits);

  Routing other;
  const auto loss = [&] {
    route(context, options, logits, other);
    // A step must not change who is chosen: there the function jumps.
    EXPECT_TRUE(std::equal(ids.begin(), ids.end(), other.ids.as<std::int32_t>()));
    const RouterLosses now = router_losses(context, options, other, counts, kShards);
    double sum = static_cast<double>(now.balance) + now.z;
    for (std::int64_t i = 0; i < kTokens * kTopk; ++i)
      sum += static_cast<double>(other.weights.as<float>()[i]) * dweights.as<float>()[i];
    return sum;
  };
  std::vector<double> differences;
  for (std::int64_t i = 0; i < kTokens * kExperts; ++i)
    differences.push_back(derivative(logits.as<float>()[i], 0.004, loss));
  expect_gradient("dlogits", differences, dlogits.as<float>(), 2e-3);
}

void check(const RouterOptions& options) {
  run_threads(1, [&](const Communicator& communicator) {
    check(Context(communicator, {.threads = 1, .backend = fastest_backend()}), options);
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

}  // namespace
}  // namespace expar::test
