// Every kind of router against its formulas in double, on every backend.
#include "tests/unit/router_oracle.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
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
    const RouterOptions options = router_preset(preset, kExperts, 4);
    if (!is_collective(options.choice)) all.push_back({std::string(preset), options});  // the others: RouterOfAll
  }
  RouterOptions v3 = router_preset("deepseek_v3", 256, 8);
  all.push_back({"deepseek_v3_256", v3});
  all.push_back({"deepseek_v2_160", router_preset("deepseek_v2", 160, 6)});
  return all;
}
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class RouterKinds : public testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(all, RouterKinds, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name; });

TEST_P(RouterKinds, choose_and_weigh_by_their_formulas) {
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
        const auto near = [&](const Tensor& got, const std::vector<double>& values, double least = 0) {
          for (std::size_t i = 0; i < values.size(); ++i) {
            const double value = values[i];
            const float number = got.rows(t, 1).as<float>()[i];
            if (double{number} == value) continue;  // both -inf
            EXPECT_NEAR(number, value, 2e-6 * std::max(std::abs(value), least)) << backend << ", token " << t;
          }
        };
        near(routing.scores, want.scores);
        near(routing.choice_scores, want.values, 0.1);  // a bias may take away what a score is
        near(routing.loss_scores, want.loss_scores);
        near(routing.weights, want.weights);
        near(routing.probabilities, oracle::scores_of({z, z + E}, Score::softmax));
      }
    });
  }
}

// ---- choices that look at the whole batch

struct Wanted {
  std::string name;
  RouterOptions options;
};
void PrintTo(const Wanted& wanted, std::ostream* out) { *out << wanted.name; }

std::vector<Wanted> wanted() {
  std::vector<Wanted> all;
  for (const char* preset : {"sinkhorn", "expert_choice"}) {
    for (const std::int64_t topk : {1, 3}) {
      RouterOptions options = router_preset(preset, kExperts, topk);
      const std::string name = preset + std::to_string(topk);
      all.push_back({name, options});
      options.score = topk == 1 ? Score::sqrt_softplus : Score::sigmoid;
      options.renormalise = true;
      options.scaling = 2.0F;
      all.push_back({name + "_otherwise", options});
      options.double_scores = true;
      all.push_back({name + "_double", options});
    }
  }
  return all;
}

class RouterOfAll : public testing::TestWithParam<Wanted> {};
INSTANTIATE_TEST_SUITE_P(all, RouterOfAll, testing::ValuesIn(wanted()),
                         [](const auto& test) { return test.param.name; });

/// Multiples of 1/64, so that a whole number may be added to a row without rounding. Some experts are liked by all.
std::vector<std::vector<double>> liked_logits() {
  const Random random(6, "logits");
  std::vector<std::vector<double>> z(kTokens, std::vector<double>(kExperts));
  for (std::int64_t i = 0; i < kTokens * kExperts; ++i) {
    const double drawn = random.normal(static_cast<std::uint64_t>(i)) + 0.1 * static_cast<double>(i % kExperts);
    z[static_cast<std::size_t>(i / kExperts)][static_cast<std::size_t>(i % kExperts)] =
        std::round(64 * drawn) / 64 + 1e-3 * static_cast<double>(i % 7);
  }
  return z;
}

/// The rows of three ranks, one of which has none, with padding that must not be seen.
struct Share {
  explicit Share(const std::vector<std::vector<double>>& z, int rank) {
    first = rank == 0 ? 0 : rank == 1 ? 40 : 40;
    const std::size_t end = rank == 0 ? 40 : rank == 1 ? 40 : z.size();
    for (std::size_t t = first; t < end; ++t) {
      if (t % 5 == 2) {
        logits.insert(logits.end(), kExperts, NAN);
        mask.push_back(0);
      }
      mask.push_back(1);
      for (const double value : z[t]) logits.push_back(static_cast<float>(value));
    }
  }
  std::size_t first = 0;
  std::vector<float> logits;
  std::vector<std::int8_t> mask;
  std::int64_t tokens() const { return static_cast<std::int64_t>(mask.size()); }
};

TEST_P(RouterOfAll, chooses_by_its_formulas_over_the_whole_batch) {
  const RouterOptions& options = GetParam().options;
  const bool is_sinkhorn = options.choice == Choice::sinkhorn;
  const std::int64_t slots = slots_of(options);
  std::vector<std::vector<double>> z = liked_logits();
  for (auto& row : z)
    for (double& value : row) value = double{static_cast<float>(value)};
  const std::vector<oracle::Route> want =
      is_sinkhorn ? oracle::sinkhorn(z, options) : oracle::experts_choose(z, options);
  std::vector<std::atomic<int>> load(kExperts);
  run_threads(3, [&](const Communicator& communicator) {
    const Share share(z, communicator.rank());
    Routing routing;
    RouteInputs inputs;
    inputs.mask = ConstTensor(share.mask.data(), {share.tokens()});
    route(Context(communicator, {.threads = 2}), options, ConstTensor(share.logits.data(), {share.tokens(), kExperts}),
          routing, inputs);
    std::size_t number = share.first;
    for (std::int64_t t = 0; t < share.tokens(); ++t) {
      const std::int32_t* ids = routing.ids.as<std::int32_t>() + t * slots;
      if (share.mask[static_cast<std::size_t>(t)] == 0) {
        EXPECT_EQ(std::count(ids, ids + slots, -1), slots);
        continue;
      }
      const oracle::Route& w = want[number++];
      // A token's plan is exp(what is compared), but for a factor.
      const float* compared = routing.choice_scores.rows(t, 1).as<float>();
      for (std::size_t e = 1; is_sinkhorn && e < kExperts; ++e)
        EXPECT_NEAR(compared[e] - compared[0], std::log(w.values[e] / w.values[0]), 2e-6);
      ASSERT_EQ(std::vector<int>(ids, ids + slots), w.ids) << "token " << number - 1;
      for (std::int64_t k = 0; k < slots; ++k) {
        const double weight = w.weights[static_cast<std::size_t>(k)];
        EXPECT_NEAR(routing.weights.as<float>()[t * slots + k], weight, 2e-6 * weight) << "token " << number - 1;
        if (ids[k] >= 0) ++load[static_cast<std::size_t>(ids[k])];
      }
    }
  });
  const std::int64_t even = (kTokens * options.topk + kExperts - 1) / kExperts;
  std::vector<std::int64_t> by_tokens(kExperts);  // if each had chosen for itself
  for (const auto& row : z) {
    for (const int id : oracle::largest(row, options.topk)) ++by_tokens[static_cast<std::size_t>(id)];
  }
  EXPECT_GT(*std::max_element(by_tokens.begin(), by_tokens.end()), 2 * even);
  for (const int slots_of_expert : load) {
    EXPECT_TRUE(is_sinkhorn || slots_of_expert == even) << slots_of_expert;
    EXPECT_LT(slots_of_expert, even + even / 2);
  }
}

TEST(RouterOfAll, does_not_overflow_where_logits_are_large) {
  const RouterOptions options{.experts = kExperts, .topk = 2, .choice = Choice::sinkhorn};
  const std::vector<std::vector<double>> z = liked_logits();
  Array plain(DType::f32, {kTokens, kExperts});
  Array large(DType::f32, {kTokens, kExperts});
  for (std::int64_t i = 0; i < kTokens * kExperts; ++i) {
    const double value = z[static_cast<std::size_t>(i / kExperts)][static_cast<std::size_t>(i % kExperts)];
    plain.as<float>()[i] = std::round(64 * static_cast<float>(value)) / 64;
    large.as<float>()[i] = plain.as<float>()[i] + 1000.0F * static_cast<float>(i / kExperts % 3 - 1);
  }
  run_threads(1, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1});
    Routing routing, other;
    route(context, options, plain, routing);
    route(context, options, large, other);
    EXPECT_EQ(std::memcmp(routing.ids.data(), other.ids.data(), routing.ids.byte_size()), 0);
  });
}

TEST(RouterOfAll, gives_what_experts_like_alike_to_the_earlier_tokens) {
  run_threads(2, [](const Communicator& communicator) {
    const Array logits(DType::f32, {5, 4});
    Routing routing;
    route(Context(communicator, {.threads = 1}), {.experts = 4, .topk = 2, .choice = Choice::experts}, logits, routing);
    for (std::int32_t i = 0; i < 20; ++i) {  // each of 4 experts takes 10 * 2 / 4 tokens
      EXPECT_EQ(routing.ids.as<std::int32_t>()[i], communicator.rank() == 0 ? i % 4 : -1) << i;
    }
  });
}

TEST(RouterOfAll, gives_ids_where_numbers_are_none) {
  run_threads(1, [](const Communicator& communicator) {
    for (const Choice choice : {Choice::sinkhorn, Choice::experts}) {
      Array logits(DType::f32, {6, 4});
      for (int i = 0; i < 24; ++i) logits.as<float>()[i] = 0.1F * static_cast<float>(i * 7 % 24);
      logits.as<float>()[4] = NAN;
      logits.as<float>()[11] = INFINITY;
      Routing routing;
      route(Context(communicator, {.threads = 1}),
            {.experts = 4, .topk = 2, .choice = choice, .nan = NanPolicy::propagate}, logits, routing);
      for (std::int64_t t = 0; t < 6; ++t) {
        const std::int64_t slots = routing.ids.size(1);
        for (std::int64_t k = 0; k < slots; ++k) {
          const std::int32_t id = routing.ids.as<std::int32_t>()[t * slots + k];
          EXPECT_TRUE(id < 4 && id >= (choice == Choice::sinkhorn ? 0 : -1)) << t;
          EXPECT_TRUE(t == 1 || t == 2 || std::isfinite(routing.weights.as<float>()[t * slots + k])) << t;
        }
      }
    }
  });
}

TEST(RouterOfAll, has_nothing_to_do_without_tokens) {
  run_threads(2, [](const Communicator& communicator) {
    for (const Choice choice : {Choice::sinkhorn, Choice::experts}) {
      const Array logits(DType::f32, {0, 4});
      Routing routing;
      route(Context(communicator, {.threads = 1}), {.experts = 4, .topk = 2, .choice = choice}, logits, routing);
      EXPECT_EQ(routing.ids.shape(), (Shape{0, choice == Choice::experts ? 4 : 2}));
    }
  });
}

TEST(RouterOfAll, fails_on_every_rank_alike) {
  run_threads(3, [](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1});
    const bool odd = communicator.rank() == 1;
    for (const Choice choice : {Choice::sinkhorn, Choice::experts}) {
      RouterOptions options{.experts = 4, .topk = 2, .choice = choice};
      Array logits(DType::f32, {3, 4});
      Routing routing;
      const auto fails_as = [&](ErrorCode code, const std::string& part, const Context& as) {
        try {
          route(as, options, logits, routing);
          ADD_FAILURE() << "no error: " << part;
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), code);
          EXPECT_NE(error.message().find(part), std::string::npos) << error.message();
        }
      };
      if (odd) logits.as<float>()[5] = NAN;
      fails_as(ErrorCode::bad_argument, "logits[1,1] is nan", context);
      logits.as<float>()[5] = 0;
      fails_as(ErrorCode::io, "no x", odd ? context.declining(Error(ErrorCode::io, "no x")) : context);
      if (odd) options.topk = 3;
      fails_as(ErrorCode::mismatch, "topk 3", context);
      options.topk = 2;
      if (odd) options.score = Score::sigmoid;
      fails_as(ErrorCode::mismatch, "score 1", context);
      options.score = Score::softmax;
      route(context, options, logits, routing);  // the ranks can go on
    }
  });
}

}  // namespace
}  // namespace expar
