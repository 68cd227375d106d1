// The layer as an object: how its parameters are drawn, and that no copy of them is ever stale.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include <expar/layer.h>

#include "src/layer/record.h"
#include "tests/fastest_backend.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

template <class Work>
void run(int ranks, Work work) {
  expect_success(run_communicators({.ranks = ranks}, [&](const Communicator& communicator) {
    work(Context(communicator, {.threads = 1, .backend = fastest_backend()}));
  }));
}

/// All ranks' experts after initialise(), in global order, the router first.
std::vector<float> initial(int ranks, std::uint64_t seed, const char* prefix) {
  const LayerCase c({.experts = 5, .bias = true});
  const std::size_t up = c.up.size() / 5;
  const std::size_t down = c.down.size() / 5;
  std::vector<float> all(c.router.size() + 5 * (up + down));
  run(ranks, [&](const Context& context) {
    MoeLayer layer(context, c.options());
    c.fill(layer);  // what was there before must not matter
    layer.initialise(seed, prefix);
    const Tensor router = layer.dense_parameters("").front().value;
    if (context.rank() == 0) std::memcpy(all.data(), router.data(), router.byte_size());
    const auto parameters = layer.expert_parameters("");
    for (std::int64_t e = 0; e < layer.local_experts().count; ++e) {
      float* to =
          all.data() + c.router.size() + static_cast<std::size_t>(layer.local_experts().first + e) * (up + down);
      std::memcpy(to, parameters[0].value.rows(e, 1).data(), up * sizeof(float));
      std::memcpy(to + up, parameters[1].value.rows(e, 1).data(), down * sizeof(float));
      for (std::int64_t i = 0; i < c.wide(); ++i) EXPECT_EQ(parameters[2].value.rows(e, 1).as<float>()[i], 0.0F);
    }
  });
  return all;
}

TEST(Layer, draws_its_parameters_by_their_global_names) {
  const std::vector<float> alone = initial(1, 3, "layers.0");
  for (const int ranks : {2, 3, 4, 7, 8}) EXPECT_EQ(initial(ranks, 3, "layers.0"), alone) << ranks << " ranks";
  EXPECT_NE(initial(1, 4, "layers.0"), alone);
  EXPECT_NE(initial(1, 3, "layers.1"), alone);
  double squares = 0;
  for (const float value : alone) squares += static_cast<double>(value) * value;
  // Inputs are 35 wide, but those of down, a third of the experts' numbers, 19.
  EXPECT_NEAR(squares / static_cast<double>(alone.size()), 2.0 / 3 / 35 + 1.0 / 3 / 19, 0.003);
}

TEST(Layer, names_its_parameters) {
  run(2, [](const Context& context) {
    MoeLayer layer(context, LayerCase({.bias = true, .dtype = DType::bf16}).options());
    const auto parameters = layer.expert_parameters("layers.3");
    ASSERT_EQ(parameters.size(), 4U);
    EXPECT_EQ(parameters[0].name, "layers.3.experts.up");
    EXPECT_EQ(parameters[1].name, "layers.3.experts.down");
    EXPECT_EQ(parameters[2].name, "layers.3.experts.up_bias");
    EXPECT_EQ(parameters[3].name, "layers.3.experts.down_bias");
    EXPECT_EQ(layer.dense_parameters("layers.3").front().name, "layers.3.router.weight");
    EXPECT_EQ(parameters[0].value.shape(), (Shape{4, 38, 35}));
    EXPECT_EQ(parameters[0].low.dtype(), DType::bf16);
    EXPECT_TRUE(parameters[2].low.absent());
    EXPECT_FALSE(parameters[2].decay);
  });
}

/// One rank's tokens with room for everything.
struct Tokens {
  Tokens(const LayerCase& c, const Context& context)
      : held(c.held(context.rank(), context.size())), x(rows_of(c, c.x, held)), dout(rows_of(c, c.dout, held)) {
    for (std::size_t s = 0; s <= held.count; ++s) shards.push_back(c.shards[held.first + s] - c.shards[held.first]);
    for (Array* a : {&out, &inferred, &dx}) *a = Array(c.spec.dtype, x.view().shape());
  }
  LayerCase::Held held;
  Array x, dout, out, inferred, dx;
  std::vector<std::int64_t> shards;
  MoeRecord record;
};

bool same_bytes(const Tensor& a, const Tensor& b) { return std::memcmp(a.data(), b.data(), a.byte_size()) == 0; }

class LayerOf : public testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(all, LayerOf, testing::Values(DType::f32, DType::bf16),
                         [](const auto& test) { return std::string(name(test.param)); });

TEST_P(LayerOf, infers_with_the_weights_of_the_last_step) {
  const LayerCase c({.bias = true, .dtype = GetParam()});
  run(2, [&](const Context& context) {
    MoeLayer layer(context, c.options());
    layer.initialise(1, "layer");
    Tokens t(c, context);
    AdamW optimizer;
    const auto parameters = layer.expert_parameters("layer");
    Array before(GetParam(), t.x.view().shape());
    for (int step = 0; step < 3; ++step) {
      layer.forward(context, t.x, t.out, {}, t.shards, t.record);
      layer.forward(context, t.x, t.inferred);
      EXPECT_TRUE(same_bytes(t.out, t.inferred)) << "step " << step;
      if (step > 0) {
        EXPECT_FALSE(same_bytes(t.out, before)) << "step " << step;
      }
      std::memcpy(before.view().data(), t.out.view().data(), t.out.view().byte_size());
      layer.backward(context, t.record, t.dout, t.dx);
      // Packed copies are made here at the latest, and stale after the step.
      layer.refresh();
      layer.forward(context, t.x, t.inferred);
      layer.backward(context, t.record, t.dout, t.dx);
      optimizer.step(context, parameters, 0.01F);
    }
  });
}

TEST_P(LayerOf, infers_with_weights_that_were_written_by_hand) {
  const LayerCase c({.dtype = GetParam()});
  run(2, [&](const Context& context) {
    MoeLayer layer(context, c.options());
    layer.initialise(1, "layer");
    Tokens t(c, context);
    layer.forward(context, t.x, t.inferred);
    c.fill(layer);
    layer.forward(context, t.x, t.inferred);
    layer.forward(context, t.x, t.out, {}, t.shards, t.record);
    EXPECT_TRUE(same_bytes(t.out, t.inferred));
  });
}

TEST_P(LayerOf, keeps_several_passes_in_flight) {
  const LayerCase c({.experts = 5, .topk = 3, .dtype = GetParam()});
  run(3, [&](const Context& context) {
    MoeLayer layer(context, c.options());
    c.fill(layer);
    Tokens alone(c, context);
    layer.forward(context, alone.x, alone.out, {}, alone.shards, alone.record);
    layer.backward(context, alone.record, alone.dout, alone.dx);

    Tokens first(c, context);
    Tokens second(c, context);
    // The second pass has other tokens, so that a mix-up would show.
    for (std::size_t i = 0; i < second.x.view().byte_size(); ++i) second.x.view().bytes()[i] = std::byte{0};
    layer.forward(context, first.x, first.out, {}, first.shards, first.record);
    layer.forward(context, second.x, second.out, {}, second.shards, second.record);
    layer.forward(context, first.x, first.inferred);
    layer.backward(context, second.record, second.dout, second.dx);
    layer.backward(context, first.record, first.dout, first.dx);
    EXPECT_TRUE(same_bytes(first.out, alone.out));
    EXPECT_TRUE(same_bytes(first.inferred, alone.out));
    EXPECT_TRUE(same_bytes(first.dx, alone.dx));
  });
}

TEST(Layer, keeps_nothing_of_the_experts_where_it_recomputes) {
  const LayerCase c({.recompute = true});
  run(2, [&](const Context& context) {
    MoeLayerOptions options = c.options();
    options.workspace = make_experts_workspace();
    MoeLayer first(context, options), second(context, options);
    c.fill(first), c.fill(second);
    Tokens a(c, context), b(c, context), alone(c, context);
    second.forward(context, alone.x, alone.out, {}, alone.shards, alone.record);
    second.backward(context, alone.record, alone.dout, alone.dx);
    // Two layers, one workspace: what the second makes of other tokens must not reach the first.
    first.forward(context, a.x, a.out, {}, a.shards, a.record);
    for (std::size_t i = 0; i < b.x.view().byte_size(); ++i) b.x.view().bytes()[i] = std::byte{0};
    second.forward(context, b.x, b.out, {}, b.shards, b.record);
    EXPECT_TRUE(a.record.kept->experts.pre.absent());
    EXPECT_TRUE(a.record.kept->experts.h.absent());
    EXPECT_TRUE(a.record.kept->y.rows().absent());
    second.backward(context, b.record, b.dout, b.dx);
    first.backward(context, a.record, a.dout, a.dx);
    EXPECT_TRUE(same_bytes(a.out, alone.out));
    EXPECT_TRUE(same_bytes(a.dx, alone.dx));
  });
}

TEST_P(LayerOf, re_routes_to_where_a_router_could_have_sent) {
  const SpecialExperts none, some{.zero = 1, .copy = 1, .constant = 1};
  for (const auto& [ranks, special] : {std::pair(1, none), {3, none}, {3, some}}) {
    const LayerCase c({.experts = 5, .topk = 2, .dtype = GetParam(), .special = special});
    run(ranks, [&](const Context& context) {
      MoeLayerOptions options = c.options();
      options.router.balance = 0;  // it would count what the router wanted first
      MoeLayer plain(context, options);
      // Of 74 slots some are for special experts.
      options.capacity = {.policy = CapacityPolicy::reroute, .rows = special.count() > 0 ? 9 : 15};
      MoeLayer bounded(context, options);
      c.fill(plain), c.fill(bounded);
      Tokens one(c, context), two(c, context);
      bounded.forward(context, one.x, one.out, {}, one.shards, one.record);
      bounded.backward(context, one.record, one.dout, one.dx);
      const Capacity& capacity = one.record.capacity;
      for (const std::int64_t rows : one.record.plan.expert_totals()) EXPECT_LE(rows, capacity.rows);
      EXPECT_GT(*std::max_element(capacity.rerouted.begin(), capacity.rerouted.end()), 0);

      plain.forward(context, two.x, two.out, {}, two.shards, two.record);
      for (std::int64_t i = 0; i < two.record.routing.ids.elements(); ++i) {
        const std::int32_t wanted = two.record.routing.ids.as<std::int32_t>()[i];
        const std::int32_t got = one.record.routing.ids.as<std::int32_t>()[i];
        EXPECT_EQ(got >= 5, wanted >= 5) << "special experts have room for all";
        EXPECT_EQ(capacity.ids.as<std::int32_t>()[i], got < 5 ? got : -1);
      }
      plain.forward(context, two.x, two.out, {}, two.shards, two.record, {.ids = one.record.routing.ids});
      plain.backward(context, two.record, two.dout, two.dx);
      EXPECT_TRUE(same_bytes(one.out, two.out));
      EXPECT_TRUE(same_bytes(one.dx, two.dx));
    });
  }
}

TEST(Layer, infers_in_place) {
  const LayerCase c({});
  run(3, [&](const Context& context) {
    MoeLayer layer(context, c.options());
    c.fill(layer);
    Tokens t(c, context);
    layer.forward(context, t.x, t.out, t.x);
    layer.forward(context, t.x, t.x, t.x);
    EXPECT_TRUE(same_bytes(t.x, t.out));
  });
}

TEST(Layer, tells_where_its_time_went_once) {
  const LayerCase c({});
  run(2, [&](const Context& context) {
    MoeLayer layer(context, c.options());
    c.fill(layer);
    Tokens t(c, context);
    layer.forward(context, t.x, t.out, {}, t.shards, t.record);
    layer.backward(context, t.record, t.dout, t.dx);
    const PhaseTimes times = layer.take_times();
    for (const double ms : {times.route, times.dispatch, times.experts, times.combine, times.backward})
      EXPECT_GT(ms, 0);
    EXPECT_EQ(layer.take_times().experts, 0);
  });
}

}  // namespace
}  // namespace expar::test
