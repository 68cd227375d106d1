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

std::vector<int> ids_of(const Routing& routing) {
  const auto* ids = routing.ids.as<std::int32_t>();
  return {ids, ids + routing.ids.elements()};
}

TEST(Route, tells_logits_apart_that_a_sigmoid_cannot) {
  with_context([](const Context& context) {
    const float logits[] = {22, 20, 28, 25};  // their sigmoids are all 1 in f32
    Routing routing;
    RouterOptions options{.experts = 4, .topk = 2, .score = Score::sigmoid, .renormalise = false};
    route(context, options, ConstTensor(logits, {1, 4}), routing);
    EXPECT_EQ(ids_of(routing), (std::vector{0, 1}));
    options.choice = Choice::logits;
    route(context, options, ConstTensor(logits, {1, 4}), routing);
    EXPECT_EQ(ids_of(routing), (std::vector{2, 3}));
    options.choice = Choice::scores;
    options.double_scores = true;
    route(context, options, ConstTensor(logits, {1, 4}), routing);
    EXPECT_EQ(ids_of(routing), (std::vector{2, 3}));
  });
}

TEST(Route, gives_ties_of_groups_and_biased_scores_to_the_lower_expert) {
  with_context([](const Context& context) {
    const Array logits(DType::f32, {1, 8});
    const float bias[] = {0, 0, 1, 0, 0, 0, 1, 0};
    Routing routing;
    RouterOptions options{.experts = 8, .topk = 3, .score = Score::sigmoid, .groups = 4, .groups_used = 2};
    route(context, options, logits, routing);
    EXPECT_EQ(ids_of(routing), (std::vector{0, 1, 2}));
    options.selection_bias = true;
    route(context, options, logits, routing, {.selection_bias = ConstTensor(bias, {8})});
    EXPECT_EQ(ids_of(routing), (std::vector{2, 6, 3}));
    EXPECT_EQ(routing.weights.as<float>()[0], routing.weights.as<float>()[2]);  // the bias chooses and does not weigh
  });
}

TEST(Route, chooses_k_experts_in_the_best_groups_where_all_biased_scores_are_negative) {
  with_context([](const Context& context) {
    const Array logits(DType::f32, {1, 6});
    const float bias[] = {-9, -9, -1, -8, -9, -9};
    Routing routing;
    route(context,
          {.experts = 6, .topk = 2, .score = Score::sigmoid, .groups = 3, .groups_used = 1, .selection_bias = true},
          logits, routing, {.selection_bias = ConstTensor(bias, {6})});
    EXPECT_EQ(ids_of(routing), (std::vector{2, 3}));
  });
}

TEST(Route, still_chooses_k_experts_of_any_router_where_a_nan_may_pass) {
  with_context([](const Context& context) {
    const float bias[6] = {};
    for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
      for (const float bad : {kNan, kInfinity, -kInfinity}) {
        Array logits(DType::f32, {1, 6});
        for (int e = 0; e < 6; e += 2) logits.as<float>()[e] = bad;
        const RouterOptions options{.experts = 6,
                                    .topk = 4,
                                    .score = score,
                                    .groups = 3,
                                    .groups_used = 2,
                                    .selection_bias = true,
                                    .nan = NanPolicy::propagate};
        Routing routing;
        route(context, options, logits, routing, {.selection_bias = ConstTensor(bias, {6})});
        const std::vector<int> ids = ids_of(routing);
        const std::set<int> chosen(ids.begin(), ids.end());
        EXPECT_EQ(chosen.size(), 4U);
        EXPECT_GE(*chosen.begin(), 0);
        EXPECT_LT(*chosen.rbegin(), 6);
      }
    }
  });
}

/// Small logits that differ.
Array some_logits(std::int64_t tokens, std::int64_t experts) {
  Array logits(DType::f32, {tokens, experts});
  for (std::int64_t i = 0; i < tokens * experts; ++i) logits.as<float>()[i] = static_cast<float>(i * 7 % 13) / 4;
  return logits;
}

TEST(Route, repeats_what_was_recorded) {
  with_context([](const Context& context) {
    const Array logits = some_logits(5, 8);
    const float bias[8] = {1, 0, 0, 0.5F, 0, 0, 0, 0};
    for (const Score score : {Score::softmax, Score::sigmoid}) {
      const RouterOptions options{.experts = 8, .topk = 3, .score = score, .selection_bias = score != Score::softmax};
      RouteInputs inputs;
      if (options.selection_bias) inputs.selection_bias = ConstTensor(bias, {8});
      Routing first;
      Routing again;
      route(context, options, logits, first, inputs);
      inputs.ids = first.ids;
      route(context, options, logits, again, inputs);
      EXPECT_EQ(ids_of(again), ids_of(first));
      for (std::int64_t i = 0; i < 15; ++i) EXPECT_EQ(again.weights.as<float>()[i], first.weights.as<float>()[i]);
    }
  });
}

TEST(Route, looks_experts_up_by_token_id) {
  with_context([](const Context& context) {
    const Array logits = some_logits(3, 4);
    const std::int32_t table[] = {0, 1, /**/ 3, 2, /**/ 2, 0};
    const std::int32_t tokens[] = {2, 0, 1};
    const RouterOptions options{.experts = 4, .topk = 2, .choice = Choice::token_table, .vocabulary = 3};
    Routing routing;
    const RouteInputs inputs{.tokens = ConstTensor(tokens, {3}), .token_table = ConstTensor(table, {3, 2})};
    route(context, options, logits, routing, inputs);
    EXPECT_EQ(ids_of(routing), (std::vector{2, 0, 0, 1, 3, 2}));
    const float* scores = routing.scores.as<float>();
    EXPECT_EQ(routing.weights.as<float>()[0], scores[2] / (scores[2] + scores[0]));
  });
}

TEST(Route, deals_experts_out_in_turn) {
  with_context([](const Context& context) {
    const Array logits = some_logits(4, 3);
    const std::int8_t mask[] = {1, 0, 1, 1};
    const RouterOptions options{.experts = 3, .topk = 2, .choice = Choice::round_robin};
    Routing routing;
    route(context, options, logits, routing, {.mask = ConstTensor(mask, {4}), .first_token = 10});
    EXPECT_EQ(ids_of(routing), (std::vector{2, 0, -1, -1, 1, 2, 0, 1}));  // padding takes no turn
    EXPECT_NE(routing.weights.as<float>()[0], 0.5F);                      // weights are of real scores
  });
}

TEST(Route, gives_padding_no_expert_and_no_score) {
  with_context([](const Context& context) {
    for (const Score score : {Score::softmax, Score::sigmoid, Score::sqrt_softplus}) {
      Array logits = some_logits(3, 4);
      logits.as<float>()[5] = kNan;  // what lies in padding is nobody's business
      const std::int8_t mask[] = {1, 0, 1};
      Routing routing;
      route(context, {.experts = 4, .topk = 2, .score = score}, logits, routing, {.mask = ConstTensor(mask, {3})});
      EXPECT_EQ(routing.valid, 2);
      EXPECT_EQ(routing.mask.as<std::int8_t>()[1], 0);
      for (int k = 2; k < 4; ++k) {
        EXPECT_EQ(routing.ids.as<std::int32_t>()[k], -1);
        EXPECT_EQ(routing.weights.as<float>()[k], 0.0F);
      }
      for (int e = 4; e < 8; ++e) {
        EXPECT_EQ(routing.loss_scores.as<float>()[e], 0.0F);
        EXPECT_EQ(routing.probabilities.as<float>()[e], 0.0F);
      }
      EXPECT_EQ(routing.logsumexp.as<float>()[1], 0.0F);
      EXPECT_GE(routing.ids.as<std::int32_t>()[4], 0);
    }
  });
}

TEST(Route, names_an_input_that_is_wrong) {
  with_context([](const Context& context) {
    const Array logits = some_logits(2, 4);
    const auto message = [&](const RouterOptions& options, const RouteInputs& inputs) -> std::string {
      Routing routing;
      try {
        route(context, options, logits, routing, inputs);
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::bad_argument);
        return error.message();
      }
      return "";
    };
    const RouterOptions plain{.experts = 4, .topk = 2};
    RouterOptions biased = plain;
    biased.selection_bias = true;
    RouterOptions hashed = plain;
    hashed.choice = Choice::token_table;
    hashed.vocabulary = 2;
    const float bias[4] = {};
    const std::int8_t mask[4] = {};
    const std::int32_t ids[] = {0, 1, 2, 4};
    const std::int32_t tokens[] = {0, 7};
    const std::int32_t table[] = {0, 1, 2, -1};
    EXPECT_EQ(message(biased, {}), "this router needs selection_bias");
    EXPECT_EQ(message(plain, {.selection_bias = ConstTensor(bias, {4})}), "this router has no use for selection_bias");
    EXPECT_EQ(message(biased, {.selection_bias = ConstTensor(bias, {3})}),
              "selection_bias is f32 [3], should be f32 [4]");
    EXPECT_EQ(message(plain, {.mask = ConstTensor(mask, {4})}), "mask is int8 [4], should be int8 [2]");
    EXPECT_EQ(message(plain, {.ids = ConstTensor(ids, {2, 2})}), "ids[1,1] = 4 is no expert below 4 and not -1");
    EXPECT_EQ(message(hashed, {}), "this router needs tokens");
    EXPECT_EQ(message(hashed, {.tokens = ConstTensor(tokens, {2})}), "this router needs token_table");
    EXPECT_EQ(message(plain, {.tokens = ConstTensor(tokens, {2})}), "this router has no use for tokens");
    EXPECT_EQ(message(hashed, {.tokens = ConstTensor(tokens, {2}), .token_table = ConstTensor(table, {2, 2})}),
              "token_table[1,1] = -1 is no expert below 4");
    EXPECT_EQ(message(hashed, {.tokens = ConstTensor(tokens, {2}), .token_table = ConstTensor(ids, {1, 2})}),
              "token_table is int32 [1, 2], should be int32 [2, 2]");
    const std::int32_t experts[] = {0, 1, 2, 3};
    EXPECT_EQ(message(hashed, {.tokens = ConstTensor(tokens, {2}), .token_table = ConstTensor(experts, {2, 2})}),
              "tokens[1] = 7 is not in the 2 rows of token_table");
  });
}

TEST(RouterOptions, that_contradict_each_other_are_refused) {
  const auto message = [](const RouterOptions& options) -> std::string {
    try {
      validate(options);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::bad_argument);
      return error.message();
    }
    return "";
  };
  EXPECT_EQ(message({.experts = 8, .topk = 2, .groups = 3}), "experts 8 cannot be cut into 3 groups of one size");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .groups = 0}), "groups is 0, must be at least 1");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .groups = 4, .groups_used = 5}), "groups_used 5 is above groups 4");
  EXPECT_EQ(message({.experts = 8, .topk = 3, .groups = 4}), "topk 3 is above the 2 experts of 1 groups");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .scaling = 0}), "scaling is 0.000000, must be a number above 0");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .choice = Choice::logits, .groups = 4, .groups_used = 2}),
            "groups are for a choice by scores");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .choice = Choice::token_table}), "vocabulary is 0, must be at least 1");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .vocabulary = 4}), "vocabulary 4 is for a choice by token table");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .jitter = 1}), "jitter is 1.000000, must be a number from 0 and below 1");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .choice = Choice::token_table, .vocabulary = 4, .selection_bias = true}),
            "a selection bias is for a choice by scores");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .choice = Choice::round_robin, .renormalise = false}), "");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .choice = Choice::sinkhorn, .balance = 0.5F}),
            "balance is 0.500000, but this choice balances by itself");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .choice = Choice::experts, .importance_cv = 2.0F}),
            "importance_cv is 2.000000, but this choice balances by itself");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .choice = Choice::sinkhorn, .selection_bias = true}),
            "a selection bias is for a choice by scores");
  EXPECT_EQ(message({.experts = 8, .topk = 2, .choice = Choice::experts, .z = 0.5F}), "");
}

TEST(RouterPresets, are_known_by_name) {
  for (const std::string_view name : router_presets()) validate(router_preset(name, 16, 2));
  try {
    (void)router_preset("qwen", 8, 2);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.message(),
              "router 'qwen' is not one of mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss, "
              "llama4, sinkhorn, expert_choice");
  }
}

TEST(SelectionBias, moves_towards_even_loads) {
  const std::vector<std::int64_t> counts{10, 4, 4, 2};  // 5 is even
  Array bias(DType::f32, {4});
  const auto values = [&] { return std::vector<float>(bias.as<float>(), bias.as<float>() + 4); };
  update_selection_bias(bias, counts, 0.5F);
  EXPECT_EQ(values(), (std::vector{-0.5F, 0.5F, 0.5F, 0.5F}));
  update_selection_bias(bias, std::vector<std::int64_t>{5, 5, 5, 5}, 0.5F);  // nobody moves
  EXPECT_EQ(values(), (std::vector{-0.5F, 0.5F, 0.5F, 0.5F}));
  update_selection_bias(bias, counts, 0.5F, BiasRule::centred);
  EXPECT_EQ(values(), (std::vector{-1.25F, 0.75F, 0.75F, 0.75F}));
  EXPECT_THROW(update_selection_bias(bias, counts, -1), Error);
  EXPECT_THROW(update_selection_bias(bias, std::vector<std::int64_t>{1, 2}, 1), Error);
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
