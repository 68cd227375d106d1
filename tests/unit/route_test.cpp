// The router's choice: scores, ties, renormalisation, and logits that are no numbers.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include <expar/registry.h>
#include <expar/router.h>

#include "tests/fastest_backend.h"

namespace expar {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class Work>
void with_context(Work work) {
  run_threads(1, [&](const Communicator& communicator) {
    work(Context(communicator, {.threads = 1, .backend = test::fastest_backend()}));
  });
}

TEST(Route, chooses_the_largest_scores_in_descending_order) {
  with_context([](const Context& context) {
    const float logits[] = {1, 3, 0, 2, /**/ -1, -1, 5, 5};
    Routing routing;
    route(context, {.experts = 4, .topk = 2}, ConstTensor(logits, {2, 4}), routing);
    const auto* ids = routing.ids.as<std::int32_t>();
    EXPECT_EQ(std::vector<int>(ids, ids + 4), (std::vector<int>{1, 3, 2, 3}));  // a tie goes to the lower index
    const double total = std::exp(1.0) + std::exp(3.0) + 1 + std::exp(2.0);
    EXPECT_NEAR(routing.scores.as<float>()[1], std::exp(3.0) / total, 1e-6);
    EXPECT_NEAR(routing.logsumexp.as<float>()[0], std::log(total), 1e-6);
    EXPECT_NEAR(routing.weights.as<float>()[0], std::exp(3.0) / (std::exp(3.0) + std::exp(2.0)), 1e-6);
    EXPECT_EQ(routing.weights.as<float>()[2], 0.5F);
    EXPECT_EQ(routing.top.as<float>()[0], routing.scores.as<float>()[1]);
  });
}

TEST(Route, keeps_the_plain_scores_where_asked) {
  with_context([](const Context& context) {
    const float logits[] = {0, 0, 0, 0};
    Routing routing;
    route(context, {.experts = 4, .topk = 3, .renormalise = false}, ConstTensor(logits, {1, 4}), routing);
    for (int k = 0; k < 3; ++k) {
      EXPECT_EQ(routing.ids.as<std::int32_t>()[k], k);
      EXPECT_EQ(routing.weights.as<float>()[k], 0.25F);
    }
  });
}

TEST(Route, takes_no_tokens) {
  with_context([](const Context& context) {
    Routing routing;
    route(context, {.experts = 4, .topk = 2}, Array(DType::f32, {0, 4}), routing);
    EXPECT_EQ(routing.ids.shape(), (Shape{0, 2}));
    const RouterLosses losses = router_losses(context, {.experts = 4, .topk = 2, .balance = 1, .z = 1}, routing,
                                              std::vector<std::int64_t>(4), std::vector<std::int64_t>{0});
    EXPECT_EQ(losses.tokens, 0);
    EXPECT_EQ(losses.balance, 0.0F);
    const Array none(DType::f32, {0, 2});
    route_backward(context, {.experts = 4, .topk = 2}, routing, losses, none, Array(DType::f32, {0, 4}));
  });
}

TEST(Route, refuses_logits_that_are_no_numbers) {
  with_context([](const Context& context) {
    for (const float bad : {kNan, kInfinity, -kInfinity}) {
      Array logits(DType::f32, {5, 6});
      logits.as<float>()[3 * 6 + 5] = bad;
      Routing routing;
      try {
        route(context, {.experts = 6, .topk = 2}, logits, routing);
        ADD_FAILURE() << "took " << bad;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::bad_argument);
        EXPECT_EQ(error.message(), std::string("logits[3,5] is ") + (std::isnan(bad) ? "nan"
                                                                     : bad > 0       ? "inf"
                                                                                     : "-inf"));
      }
    }
  });
}

TEST(Route, still_chooses_k_experts_where_a_nan_may_pass) {
  with_context([](const Context& context) {
    for (const float bad : {kNan, kInfinity, -kInfinity}) {
      Array logits(DType::f32, {3, 6});
      logits.as<float>()[6 + 2] = bad;
      Routing routing;
      route(context, {.experts = 6, .topk = 4, .nan = NanPolicy::propagate}, logits, routing);
      for (int t = 0; t < 3; ++t) {
        const auto* ids = routing.ids.as<std::int32_t>() + static_cast<std::ptrdiff_t>(4) * t;
        const std::set<int> chosen(ids, ids + 4);
        EXPECT_EQ(chosen.size(), 4U) << t;
        EXPECT_GE(*chosen.begin(), 0);
        EXPECT_LT(*chosen.rbegin(), 6);
      }
      EXPECT_EQ(routing.weights.as<float>()[0], 0.25F);  // the other tokens are as they were
    }
  });
}

TEST(Route, names_what_is_wrong_with_its_arguments) {
  with_context([](const Context& context) {
    const auto message = [&](const RouterOptions& options, const ConstTensor& logits) -> std::string {
      Routing routing;
      try {
        route(context, options, logits, routing);
      } catch (const Error& error) {
        return error.message();
      }
      return "";
    };
    const Array logits(DType::f32, {2, 8});
    const Array narrow(DType::bf16, {2, 8});
    EXPECT_EQ(message({.experts = 8, .topk = 9}, logits), "topk 9 is above experts 8");
    EXPECT_EQ(message({.experts = 4, .topk = 1}, logits), "logits is f32 [2, 8], should be f32 [2, 4]");
    EXPECT_EQ(message({.experts = 8, .topk = 1}, narrow), "logits is bf16 [2, 8], should be f32 [2, 8]");
    EXPECT_EQ(message({.experts = 8, .topk = 8}, logits), "");
  });
}

TEST(Route, refuses_gradients_of_losses_that_do_not_cover_its_tokens) {
  with_context([](const Context& context) {
    const RouterOptions options{.experts = 2, .topk = 1};
    const Array logits(DType::f32, {3, 2});
    const Array dweights(DType::f32, {3, 1});
    Routing routing;
    route(context, options, logits, routing);
    const auto message = [&](std::vector<std::int64_t> segments, std::size_t dscores) -> std::string {
      RouterLosses losses;
      losses.segments = std::move(segments);
      losses.dscores.resize(dscores);
      try {
        route_backward(context, options, routing, losses, dweights, Array(DType::f32, {3, 2}));
      } catch (const Error& error) {
        return error.message();
      }
      return "";
    };
    EXPECT_EQ(message({0, 3}, 2), "");
    EXPECT_EQ(message({}, 0), "");
    EXPECT_EQ(message({0, 3}, 3), "dscores of the losses has 3 entries for 1 segments of 2 experts");
    for (const std::vector<std::int64_t>& wrong : {std::vector<std::int64_t>{0, 2}, {1, 3}})
      EXPECT_NE(message(wrong, 2).find("should ascend from 0 to the 3 tokens of this rank"), std::string::npos);
    EXPECT_NE(message({0, 2, 1, 3}, 6).find("should ascend"), std::string::npos);
  });
}

TEST(RouterLosses, are_what_their_formulas_say) {
  with_context([](const Context& context) {
    const float logits[] = {2, 1, 0, /**/ 0, 3, 0, /**/ 1, 1, 4, /**/ 0, 5, 0};
    const RouterOptions options{.experts = 3, .topk = 1, .balance = 0.5F, .z = 0.25F};
    Routing routing;
    route(context, options, ConstTensor(logits, {4, 3}), routing);
    const std::vector<std::int64_t> counts{1, 2, 1};
    const RouterLosses losses = router_losses(context, options, routing, counts, std::vector<std::int64_t>{0, 1, 4});
    double mean[3] = {};
    double squares = 0;
    for (int t = 0; t < 4; ++t) {
      double total = 0;
      for (int e = 0; e < 3; ++e) total += std::exp(logits[3 * t + e]);
      for (int e = 0; e < 3; ++e) mean[e] += std::exp(logits[3 * t + e]) / total / 4;
      squares += std::log(total) * std::log(total) / 4;
    }
    EXPECT_EQ(losses.tokens, 4);
    EXPECT_EQ(losses.load_fraction, (std::vector<float>{0.25F, 0.5F, 0.25F}));
    EXPECT_NEAR(losses.balance, 0.5 * 3 * (0.25 * mean[0] + 0.5 * mean[1] + 0.25 * mean[2]), 1e-6);
    EXPECT_NEAR(losses.z, 0.25 * squares, 1e-6);
  });
}

}  // namespace
}  // namespace expar
