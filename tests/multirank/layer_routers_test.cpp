// The layer with every router: the same bytes on any number of ranks, padding as if it were not there, jitter and the
// router's bias with their gradients.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include <expar/collectives.h>
#include <expar/random.h>
#include <expar/registry.h>

#include "tests/fastest_backend.h"
#include "tests/gradient/differences.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

constexpr std::int64_t kExperts = 8, kTopk = 3, kVocabulary = 5;

struct NamedRouter {
  std::string name;
  RouterOptions options;
};

std::vector<NamedRouter> routers() {
  std::vector<NamedRouter> all;
  const auto add = [&](const std::string& name, RouterOptions options) {
    options.experts = kExperts;
    options.topk = kTopk;
    options.balance = is_collective(options.choice) ? 0.0F : 0.5F;  // no loss balances a choice that does so itself
    options.z = 0.125F;
    all.push_back({name, options});
  };
  for (const std::string_view name : router_presets()) {
    add(std::string(name), router_preset(name, kExperts, kTopk));
  }
  add("sqrt_softplus", {.score = Score::sqrt_softplus, .scaling = 1.5F, .double_scores = true});
  add("groups", {.score = Score::sigmoid, .groups = 4, .groups_used = 2, .selection_bias = true, .bias = true});
  add("jitter", {.renormalise = false, .jitter = 0.25F});
  add("token_table", {.score = Score::sqrt_softplus, .choice = Choice::token_table, .vocabulary = kVocabulary});
  add("sinkhorn_sigmoid", {.score = Score::sigmoid, .choice = Choice::sinkhorn, .bias = true, .jitter = 0.1F});
  add("expert_choice_sigmoid", {.score = Score::sigmoid, .choice = Choice::experts, .scaling = 1.5F});
  add("round_robin", {.choice = Choice::round_robin, .jitter = 0.1F});
  return all;
}
void PrintTo(const NamedRouter& router, std::ostream* out) { *out << router.name; }

/// A batch of the case, with or without some of its tokens.
struct Batch {
  std::vector<float> x, dout;        // [T, H]
  std::vector<std::int32_t> words;   // [T] token ids
  std::vector<std::int8_t> mask;     // [T], or empty
  std::vector<std::int64_t> shards;  // [S + 1]
};

Batch batch_of(const LayerCase& c) {
  Batch batch{c.x, c.dout, {}, {}, c.shards};
  for (std::int64_t t = 0; t < c.tokens(); ++t) batch.words.push_back(static_cast<std::int32_t>(t * t % kVocabulary));
  return batch;
}

/// Without the tokens that the mask leaves out.
Batch without_padding(const Batch& batch, std::int64_t hidden) {
  Batch rest;
  rest.shards = {0};
  std::size_t s = 1;
  for (std::size_t t = 0; t <= batch.mask.size(); ++t) {
    while (s < batch.shards.size() && batch.shards[s] == static_cast<std::int64_t>(t)) {
      rest.shards.push_back(static_cast<std::int64_t>(rest.words.size()));
      ++s;
    }
    if (t == batch.mask.size() || batch.mask[t] == 0) continue;
    const auto row = static_cast<std::ptrdiff_t>(t) * hidden;
    rest.x.insert(rest.x.end(), batch.x.begin() + row, batch.x.begin() + row + hidden);
    rest.dout.insert(rest.dout.end(), batch.dout.begin() + row, batch.dout.begin() + row + hidden);
    rest.words.push_back(batch.words[t]);
  }
  return rest;
}

/// With shared experts, which must not see padding either.
LayerSpec spec() { return {.experts = kExperts, .topk = kTopk, .shared_inner = 9, .shared_gate = true}; }
/// The same router, whose last experts are special ones.
LayerSpec special() {
  LayerSpec with = spec();
  with.special = {.zero = 1, .copy = 1, .constant = 1};
  with.experts -= with.special.count();
  return with;
}

/// What a training step and an inference gave, in global order.
struct Result {
  std::vector<float> out, inference, dx, router, router_bias, up, down, shared, losses;
  std::vector<std::int64_t> loads;
};

void copy(const ConstTensor& from, std::vector<float>& to, std::int64_t at) {
  std::memcpy(to.data() + at, from.data(), from.byte_size());
}

Result run(const LayerCase& c, const RouterOptions& router, const Batch& batch, int ranks) {
  const std::int64_t H = c.spec.hidden;
  const auto S = static_cast<std::int64_t>(batch.shards.size()) - 1;
  Result result;
  for (auto* rows : {&result.out, &result.inference, &result.dx}) rows->resize(batch.x.size(), NAN);
  result.router.resize(static_cast<std::size_t>(S * kExperts * H));
  result.router_bias.resize(static_cast<std::size_t>(S * kExperts));
  result.up.resize(c.up.size());
  result.down.resize(c.down.size());
  result.shared.resize(static_cast<std::size_t>(S) * (c.shared_up.size() + c.shared_down.size() + c.shared_gate.size() +
                                                      c.special_mix.size() + c.special_value.size()));
  result.losses.resize(2);
  expect_success(run_communicators({.ranks = ranks}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = ranks == 1 ? 2 : 1, .backend = fastest_backend()});
    MoeLayerOptions options = c.options();
    options.router = router;
    MoeLayer layer(context, options);
    layer.initialise(3, "layer");  // the token table
    c.fill(layer);
    for (std::int64_t e = 0; e < kExperts; ++e) {
      if (router.selection_bias) layer.selection_bias().as<float>()[e] = 0.05F * static_cast<float>(e * 3 % 7);
      if (router.bias) layer.dense_parameters("")[1].value.as<float>()[e] = 0.1F * static_cast<float>(e % 3);
    }
    const LayerCase::Held held = c.held(context.rank(), context.size());
    const std::int64_t first = batch.shards[held.first];
    std::vector<std::int64_t> shards;
    for (std::size_t s = 0; s <= held.count; ++s) shards.push_back(batch.shards[held.first + s] - first);
    const std::int64_t tokens = shards.back();
    const ConstTensor x(batch.x.data() + first * H, {tokens, H});
    const ConstTensor dout(batch.dout.data() + first * H, {tokens, H});
    MoeInputs inputs{.seed = 11, .stream = "step 4"};
    if (!batch.mask.empty()) inputs.mask = ConstTensor(batch.mask.data() + first, {tokens});
    if (router.choice == Choice::token_table) inputs.tokens = ConstTensor(batch.words.data() + first, {tokens});
    const Array out(DType::f32, {tokens, H});
    const Array dx(DType::f32, {tokens, H});
    layer.forward(context, x, out, {}, inputs);
    copy(out, result.inference, first * H);
    MoeRecord record;
    layer.forward(context, x, out, {}, shards, record, inputs);
    layer.backward(context, record, dout, dx);
    copy(out, result.out, first * H);
    copy(dx, result.dx, first * H);
    const auto from = static_cast<std::int64_t>(held.first);
    copy(layer.dense_shard_gradients().front(), result.router, from * kExperts * H);
    if (router.bias) copy(layer.dense_shard_gradients()[1], result.router_bias, from * kExperts);
    std::int64_t section = 0;
    std::vector<ConstTensor> everywhere = layer.dense_shard_gradients();
    everywhere.erase(everywhere.begin(), everywhere.begin() + (router.bias ? 2 : 1));
    for (const ConstTensor& gradient : everywhere) {
      std::int64_t each = 1;
      for (int axis = 1; axis < gradient.shape().rank(); ++axis) each *= gradient.size(axis);
      copy(gradient, result.shared, section + from * each);
      section += S * each;
    }
    const ExpertRange local = layer.local_experts();
    const std::vector<Parameter> experts = layer.expert_parameters("");
    copy(experts[0].gradient, result.up, local.first * c.wide() * H);
    copy(experts[1].gradient, result.down, local.first * H * c.spec.inner);
    if (context.rank() == 0) {
      result.losses = {record.losses.balance, record.losses.z};
      result.loads.assign(record.plan.expert_totals().begin(), record.plan.expert_totals().end());
    }
  }));
  return result;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void expect_same(const Result& a, const Result& b, const std::string& where) {
  EXPECT_TRUE(same(a.out, b.out)) << where << ": out";
  EXPECT_TRUE(same(a.inference, b.inference)) << where << ": inference";
  EXPECT_TRUE(same(a.dx, b.dx)) << where << ": dx";
  EXPECT_TRUE(same(a.router, b.router)) << where << ": gradient of the router";
  EXPECT_TRUE(same(a.router_bias, b.router_bias)) << where << ": gradient of the router's bias";
  EXPECT_TRUE(same(a.up, b.up)) << where << ": gradient of up";
  EXPECT_TRUE(same(a.down, b.down)) << where << ": gradient of down";
  EXPECT_TRUE(same(a.shared, b.shared)) << where << ": gradients of the shared experts";
  EXPECT_TRUE(same(a.losses, b.losses)) << where << ": losses";
  EXPECT_EQ(a.loads, b.loads) << where;
}

std::vector<std::int8_t> some_padding(std::size_t tokens) {
  std::vector<std::int8_t> mask(tokens, 1);
  for (std::size_t t = 0; t < tokens; ++t) {
    if (t % 3 == 1 || (t >= 12 && t < 20)) mask[t] = 0;  // a whole shard among them
  }
  return mask;
}

class LayerRouters : public testing::TestWithParam<NamedRouter> {};
INSTANTIATE_TEST_SUITE_P(all, LayerRouters, testing::ValuesIn(routers()),
                         [](const auto& test) { return test.param.name; });

TEST_P(LayerRouters, give_the_same_bytes_on_any_number_of_ranks) {
  for (const LayerSpec& with : {spec(), special()}) {
    const LayerCase c(with);
    Batch batch = batch_of(c);
    for (const bool padded : {false, true}) {
      if (padded) batch.mask = some_padding(batch.words.size());
      const Result alone = run(c, GetParam().options, batch, 1);
      EXPECT_FALSE(std::any_of(alone.dx.begin(), alone.dx.end(), [](float v) { return std::isnan(v); }));
      for (const int ranks : {2, 3, 8}) {
        expect_same(run(c, GetParam().options, batch, ranks), alone, std::to_string(ranks) + " ranks");
      }
    }
  }
}

TEST_P(LayerRouters, treat_padding_as_if_it_were_not_there) {
  for (const LayerSpec& with : {spec(), special()}) {
    const LayerCase c(with);
    const std::int64_t H = c.spec.hidden;
    Batch batch = batch_of(c);
    batch.mask = some_padding(batch.words.size());
    for (std::size_t t = 0; t < batch.mask.size(); ++t) {
      if (batch.mask[t] == 0) batch.words[t] = -7;  // nobody reads it
    }
    Result padded = run(c, GetParam().options, batch, 3);
    // The rows of padding are zero; the others are what is left.
    std::size_t rows = 0;
    for (auto* all : {&padded.out, &padded.inference, &padded.dx}) {
      std::vector<float> left;
      for (std::size_t t = 0; t < batch.mask.size(); ++t) {
        const auto row = all->begin() + static_cast<std::ptrdiff_t>(t) * H;
        if (batch.mask[t] != 0) {
          left.insert(left.end(), row, row + H);
        } else {
          EXPECT_TRUE(std::all_of(row, row + H, [](float v) { return v == 0.0F; })) << "token " << t;
          ++rows;
        }
      }
      *all = left;
    }
    EXPECT_GT(rows, 3U);
    expect_same(padded, run(c, GetParam().options, without_padding(batch, H), 2), "padding and none");
  }
}

TEST(LayerRouter, repeats_a_recorded_pass) {
  const LayerCase c({.experts = kExperts, .topk = kTopk});
  run_threads(1, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    MoeLayerOptions options = c.options();
    options.router = router_preset("deepseek_v3", kExperts, kTopk);
    MoeLayer layer(context, options);
    c.fill(layer);
    const ConstTensor x(c.x.data(), {c.tokens(), c.spec.hidden});
    const Array first(DType::f32, x.shape());
    const Array again(DType::f32, x.shape());
    MoeRecord record;
    layer.forward(context, x, first, {}, c.shards, record);
    layer.selection_bias().as<float>()[2] = 5.0F;  // would send everybody elsewhere
    layer.forward(context, x, again, {}, {.ids = record.routing.ids});
    EXPECT_EQ(std::memcmp(first.view().data(), again.view().data(), x.byte_size()), 0);
    layer.forward(context, x, again);
    EXPECT_NE(std::memcmp(first.view().data(), again.view().data(), x.byte_size()), 0);
  });
}

TEST(LayerRouter, repeats_a_choice_of_the_whole_batch_without_it) {
  const LayerCase c({.experts = kExperts, .topk = kTopk});
  for (const char* name : {"sinkhorn", "expert_choice"}) {
    run_threads(2, [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
      MoeLayerOptions options = c.options();
      options.router = router_preset(name, kExperts, kTopk);
      MoeLayer layer(context, options);
      c.fill(layer);
      const LayerCase::Held held = c.held(context.rank(), 2);
      const Array x = rows_of(c, c.x, held);
      const Array all(DType::f32, x.view().shape());
      const Array few(DType::f32, x.view().shape());
      const std::vector<std::int64_t> shards{0, x.view().size(0)};
      MoeRecord record;
      layer.forward(context, x, all, {}, shards, record);
      // As if there were the first two tokens of each rank alone.
      const ConstTensor two = x.view().rows(0, 2);
      const Tensor out = few.view().rows(0, 2);
      layer.forward(context, two, out, {}, {.ids = record.routing.ids.rows(0, 2)});
      EXPECT_EQ(std::memcmp(all.view().data(), out.data(), out.byte_size()), 0) << name;
      layer.forward(context, two, out);
      EXPECT_NE(std::memcmp(all.view().data(), out.data(), out.byte_size()), 0) << name;
    });
  }
}

TEST(LayerRouter, lets_experts_choose_with_bounded_plans) {
  const LayerCase c({.experts = kExperts, .topk = kTopk});
  run_threads(3, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    MoeLayerOptions options = c.options();
    options.router = router_preset("expert_choice", kExperts, kTopk);
    MoeLayer exact(context, options);
    options.bound = c.tokens();
    MoeLayer bounded(context, options);
    c.fill(exact);
    c.fill(bounded);
    const Array x = rows_of(c, c.x, c.held(context.rank(), 3));
    const Array want(DType::f32, x.view().shape());
    const Array got(DType::f32, x.view().shape());
    exact.forward(context, x, want);
    bounded.forward(context, x, got);
    EXPECT_EQ(std::memcmp(want.view().data(), got.view().data(), x.view().byte_size()), 0);
  });
}

TEST(LayerRouter, goes_by_the_plain_logits_where_sinkhorn_has_nothing_to_teach) {
  const LayerCase c({.experts = kExperts, .topk = kTopk});
  const RouterOptions sinkhorn = router_preset("sinkhorn", kExperts, kTopk);
  RouterOptions plain = sinkhorn;
  plain.choice = Choice::logits;
  const Result balanced = run(c, sinkhorn, batch_of(c), 3);
  EXPECT_TRUE(same(balanced.inference, run(c, plain, batch_of(c), 2).inference));
  EXPECT_FALSE(same(balanced.inference, balanced.out));
}

TEST(LayerRouter, deals_out_the_same_load_to_every_expert) {
  const LayerCase c({.experts = kExperts, .topk = kTopk});
  const Result result = run(c, {.experts = kExperts, .topk = kTopk, .choice = Choice::round_robin}, batch_of(c), 3);
  const auto [least, most] = std::minmax_element(result.loads.begin(), result.loads.end());
  EXPECT_LE(*most - *least, 1);  // 37 tokens and 3 slots on 8 experts
}

TEST(LayerRouter, lets_every_expert_take_as_many_tokens) {
  const LayerCase c({.experts = kExperts, .topk = kTopk});
  const Result result =
      run(c, {.experts = kExperts, .topk = kTopk, .choice = Choice::experts, .renormalise = false}, batch_of(c), 3);
  EXPECT_EQ(result.loads, std::vector<std::int64_t>(kExperts, 14));  // ceil(37 * 3 / 8)
}

TEST(LayerRouter, trains_its_bias_as_the_weight_of_a_constant) {
  // Element 0 of every token is 1, so the gradient of the bias is that of the weights of element 0.
  const LayerCase c({.experts = kExperts, .topk = kTopk});
  const Result result = run(c, {.experts = kExperts, .topk = kTopk, .bias = true}, batch_of(c), 2);
  double size = 0;
  for (std::size_t i = 0; i < result.router_bias.size(); ++i) {
    const float weight = result.router[i * static_cast<std::size_t>(c.spec.hidden)];
    EXPECT_EQ(result.router_bias[i], weight) << i;
    size += std::abs(weight);
  }
  EXPECT_GT(size, 0);
}

TEST(LayerRouter, differentiates_through_its_jitter) {
  run_threads(1, [](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    constexpr std::int64_t kTokens = 3, kHidden = 5;
    const MoeLayerOptions options{.hidden = kHidden,
                                  .inner = 4,
                                  // no choice, so no jumps
                                  .router = {.experts = 3, .topk = 3, .score = Score::sigmoid, .jitter = 0.9F},
                                  .activation = Activation::gelu};
    MoeLayer layer(context, options);
    layer.initialise(5, "");
    const Random random(9, "x");
    Array x(DType::f32, {kTokens, kHidden});
    Array dout(DType::f32, {kTokens, kHidden});
    for (std::int64_t i = 0; i < kTokens * kHidden; ++i) {
      x.as<float>()[i] = random.normal(static_cast<std::uint64_t>(i));
      dout.as<float>()[i] = random.normal(static_cast<std::uint64_t>(100 + i));
    }
    const Array out(DType::f32, x.view().shape());
    const Array dx(DType::f32, x.view().shape());
    const std::vector<std::int64_t> shards{0, kTokens};
    const MoeInputs inputs{.seed = 2, .stream = "step 1"};
    MoeRecord record;
    const auto loss = [&] {
      layer.forward(context, x, out, {}, shards, record, inputs);
      double sum = 0;
      for (std::int64_t i = 0; i < kTokens * kHidden; ++i) {
        sum += double{out.as<float>()[i]} * double{dout.as<float>()[i]};
      }
      return sum;
    };
    loss();
    layer.backward(context, record, dout, dx);
    std::vector<double> differences;
    for (std::int64_t i = 0; i < kTokens * kHidden; ++i) {
      differences.push_back(derivative(x.as<float>()[i], 0.01, loss));
    }
    expect_gradient("dx", differences, dx.as<float>(), 1e-3);
    std::vector<double> weights;
    const Tensor router = layer.dense_parameters("").front().value;
    for (std::int64_t i = 0; i < router.elements(); ++i) {
      weights.push_back(derivative(router.as<float>()[i], 0.01, loss));
    }
    expect_gradient("router", weights, layer.dense_shard_gradients().front().as<float>(), 1e-3);

    const double before = loss();
    MoeInputs other = inputs;
    other.stream = "step 2";
    layer.forward(context, x, out, {}, shards, record, other);
    double after = 0;
    for (std::int64_t i = 0; i < kTokens * kHidden; ++i)
      after += double{out.as<float>()[i]} * double{dout.as<float>()[i]};
    EXPECT_NE(before, after);  // each step has its own
  });
}

TEST(LayerRouterErrors, reach_every_rank) {
  const LayerCase c({.experts = kExperts, .topk = kTopk});
  expect_success(run_communicators({.ranks = 3}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    const auto message = [&](auto call) -> std::string {
      try {
        call();
      } catch (const Error& error) {
        return error.message();
      }
      return "";
    };
    MoeLayerOptions options = c.options();
    options.router = {.experts = kExperts, .topk = kTopk, .scaling = context.rank() == 2 ? 2.5F : 1.0F};
    EXPECT_EQ(message([&] { MoeLayer layer(context, options); }),
              "routers disagree: rank 0 has scaling 1.000000; rank 2 has scaling 2.500000");

    // Before tokens are counted, and after.
    options.router.scaling = 1.0F;
    options.router.choice = Choice::round_robin;
    MoeLayer layer(context, options);
    const Array x(DType::f32, {4, c.spec.hidden});
    const Array out(DType::f32, {4, c.spec.hidden});
    const Array narrow(DType::f32, {4, c.spec.hidden - 1});
    const Array mask(DType::int8, {context.rank() == 1 ? 3 : 4});
    EXPECT_NE(message([&] { layer.forward(context, context.rank() == 1 ? narrow : x, out); }).find("x is f32 [4, 34]"),
              std::string::npos);
    EXPECT_NE(message([&] { layer.forward(context, x, out, {}, {.mask = mask}); }).find("mask is int8 [3]"),
              std::string::npos);
    const Array ids(DType::int32, {4, kTopk});
    if (context.rank() == 2) ids.as<std::int32_t>()[4] = kExperts;
    EXPECT_NE(message([&] { layer.forward(context, x, out, {}, {.ids = ids}); }).find("ids[1,1] = 8"),
              std::string::npos);
    layer.forward(context, x, out);

    for (const Choice choice : {Choice::sinkhorn, Choice::experts}) {
      options.router.choice = choice;
      MoeLayer together(context, options);
      const std::vector<std::int64_t> shards{0, 4};
      MoeRecord record;
      const auto fails = [&](const Array& of, const MoeInputs& inputs) {
        return message([&] { together.forward(context, of, out, {}, shards, record, inputs); });
      };
      const Array bad(DType::f32, {4, c.spec.hidden});
      if (context.rank() == 1) bad.as<float>()[0] = NAN;
      EXPECT_NE(fails(bad, {}).find("logits[0,0] is nan"), std::string::npos);
      EXPECT_NE(fails(context.rank() == 1 ? narrow : x, {}).find("x is f32 [4, 34]"), std::string::npos);
      EXPECT_NE(fails(x, {.mask = mask}).find("mask is int8 [3]"), std::string::npos);
      const Array given(DType::int32, {4, slots_of(options.router)});
      MoeInputs some;
      if (context.rank() == 0) some.ids = given;
      EXPECT_NE(fails(x, some).find("rank 0 runs plan"), std::string::npos);  // the others are still at route
      EXPECT_EQ(fails(x, {}), "");
    }
    options.capacity = {.policy = CapacityPolicy::drop_by_position, .factor = 1};
    EXPECT_EQ(message([&] { const MoeLayer bounded(context, options); }),
              "experts that choose their tokens take as many each: the layer must have no capacity");
  }));
}

}  // namespace
}  // namespace expar::test
