// Every kind of router against its formulas in double, on every backend.
#include "tests/unit/router_oracle.h"

#include <gtest/gtest.h>

#include <string>

#include <expar/random.h>
#include <expar/registry.h>

namespace expar {
namespace {

constexpr std::int64_t kTokens = 300, kExperts = 24;  // more tokens than one task takes

struct Case {
  std::string name;
  RouterOptions options;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const std::string& name, RouterOptions options) {
    options.experts = kExperts;
    for (const bool wide : {false, true}) {
      options.double_scores = wide;
      all.push_back({name + (wide ? "_double" : ""), options});
    }
  };
  const std::pair<const char*, Score> scores[] = {
      {"softmax", Score::softmax}, {"sigmoid", Score::sigmoid}, {"sqrt_softplus", Score::sqrt_softplus}};
  for (const auto& [name, score] : scores) {
    const std::string of = name;
    add(of, {.topk = 4, .score = score});
    add(of + "_plain", {.topk = 4, .score = score, .renormalise = false});
    add(of + "_one", {.topk = 1, .score = score, .renormalise = false});
    add(of + "_scaled", {.topk = 3, .score = score, .scaling = 2.5F});
    add(of + "_by_logits", {.topk = 3, .score = score, .choice = Choice::logits, .renormalise = false});
    add(of + "_groups", {.topk = 4, .score = score, .groups = 6, .groups_used = 2});
    add(of + "_bias", {.topk = 4, .score = score, .selection_bias = true});
    add(of + "_bias_groups", {.topk = 5, .score = score, .groups = 8, .groups_used = 3, .selection_bias = true});
    add(of + "_groups_of_one", {.topk = 3, .score = score, .groups = 24, .groups_used = 4, .selection_bias = true});
    add(of + "_everybody", {.topk = kExperts, .score = score});
  }
  for (const std::string_view preset : router_presets()) {
    all.push_back({std::string(preset), router_preset(preset, kExperts, 4)});
  }
  RouterOptions v3 = router_preset("deepseek_v3", 256, 8);
  all.push_back({"deepseek_v3_256", v3});
  all.push_back({"deepseek_v2_160", router_preset("deepseek_v2", 160, 6)});
  return all;
}
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class RouterOracle : public testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(all, RouterOracle, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name; });

TEST_P(RouterOracle, agrees) {
  const RouterOptions options = GetParam().options;
  const std::int64_t E = options.experts, K = options.topk;
  const Random random(5, "logits");
  Array logits(DType::f32, {kTokens, E});
  Array bias(DType::f32, {E});
  for (std::int64_t i = 0; i < kTokens * E; ++i)
    logits.as<float>()[i] = 2.0F * random.normal(static_cast<std::uint64_t>(i));
  for (std::int64_t e = 0; e < E; ++e)
    bias.as<float>()[e] = 0.3F * random.normal(static_cast<std::uint64_t>(kTokens * E + e));
  std::vector<double> b;
  if (options.selection_bias) b.assign(bias.as<float>(), bias.as<float>() + E);

  for (const std::string& backend : available_backends()) {
    run_threads(1, [&](const Communicator& communicator) {
      Routing routing;
      RouteInputs inputs;
      if (options.selection_bias) inputs.selection_bias = bias;
      route(Context(communicator, {.threads = 2, .backend = backend}), options, logits, routing, inputs);
      EXPECT_EQ(routing.valid, kTokens);
      for (std::int64_t t = 0; t < kTokens; ++t) {
        const float* z = logits.as<float>() + t * E;
        const oracle::Route want = oracle::route({z, z + E}, options, b);
        const std::int32_t* ids = routing.ids.as<std::int32_t>() + t * K;
        ASSERT_EQ(std::vector<int>(ids, ids + K), want.ids) << backend << ", token " << t;
        const auto near = [&](const Tensor& got, const std::vector<double>& values) {
          for (std::size_t i = 0; i < values.size(); ++i) {
            const double value = values[i];
            EXPECT_NEAR(got.rows(t, 1).as<float>()[i], value, 2e-6 * std::abs(value)) << backend << ", token " << t;
          }
        };
        near(routing.scores, want.scores);
        near(routing.loss_scores, want.loss_scores);
        near(routing.weights, want.weights);
        near(routing.probabilities, oracle::scores_of({z, z + E}, Score::softmax));
      }
    });
  }
}

}  // namespace
}  // namespace expar
