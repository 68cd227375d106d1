// The layer against a double-precision loop: output, losses and every gradient, on any number of ranks.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include <expar/collectives.h>
#include <expar/mesh.h>
#include <expar/registry.h>

#include "tests/fastest_backend.h"
#include "tests/multirank/capacity_oracle.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/oracle.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

using oracle::Real;
using oracle::Vector;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

Vector part(const std::vector<float>& all, std::int64_t index, std::int64_t parts) {
  const auto count = static_cast<std::ptrdiff_t>(all.size()) / parts;
  return {all.begin() + index * count, all.begin() + (index + 1) * count};
}

oracle::Layer oracle_layer(const LayerCase& c) {
  oracle::Layer layer;
  layer.hidden = static_cast<std::size_t>(c.spec.hidden);
  layer.inner = static_cast<std::size_t>(c.spec.inner);
  layer.topk = static_cast<std::size_t>(c.spec.topk);
  layer.activation = c.spec.activation;
  layer.numbers = c.spec.numbers;
  layer.weights_on = c.spec.weights_on;
  layer.renormalise = c.spec.renormalise;
  layer.bf16 = c.spec.dtype == DType::bf16;
  layer.balance = c.options().router.balance;
  layer.z = c.options().router.z;
  layer.router = part(c.router, 0, 1);
  layer.zero = at(c.spec.special.zero), layer.copy = at(c.spec.special.copy);
  layer.mix = part(c.special_mix, 0, 1), layer.value = part(c.special_value, 0, 1);
  if (c.spec.shared_inner > 0) {
    layer.shared = {part(c.shared_up, 0, 1), part(c.shared_down, 0, 1), {}, {}};
    layer.shared_gate = part(c.shared_gate, 0, 1);
  }
  for (std::int64_t e = 0; e < c.spec.experts; ++e) {
    layer.experts.push_back({part(c.up, e, c.spec.experts), part(c.down, e, c.spec.experts), {}, {}});
    if (!c.spec.bias) continue;
    layer.experts.back().up_bias = part(c.up_bias, e, c.spec.experts);
    layer.experts.back().down_bias = part(c.down_bias, e, c.spec.experts);
  }
  return layer;
}

/// What the layer should give, in the sections of LayerResult.
struct Expected {
  std::vector<Vector> sections;
  double smallest_gap = INFINITY;

  explicit Expected(const LayerCase& c);
};

void append(Vector& to, const Vector& from) { to.insert(to.end(), from.begin(), from.end()); }

/// [T, K] which slots the capacity has no room for.
std::vector<std::vector<bool>> dropped_slots(const LayerCase& c, const oracle::Layer& layer) {
  std::vector<std::vector<bool>> dropped(at(c.tokens()), std::vector<bool>(layer.topk));
  if (c.spec.capacity.policy == CapacityPolicy::none) return dropped;
  oracle::Batch batch;
  batch.tokens = c.tokens(), batch.experts = c.spec.experts, batch.topk = c.spec.topk;
  for (std::int64_t t = 0; t < c.tokens(); ++t) {
    const oracle::Token walk = oracle::forward(layer, part(c.x, t, c.tokens()), part(c.residual, t, c.tokens()));
    for (const std::size_t e : walk.ids) {
      batch.ids.push_back(e < layer.experts.size() ? static_cast<std::int32_t>(e) : -1);
      batch.top.push_back(static_cast<float>(walk.scores[e].value));
    }
  }
  const std::vector<std::int32_t> ids = oracle::bounded(batch, c.spec.capacity);
  for (std::size_t i = 0; i < ids.size(); ++i) dropped[i / layer.topk][i % layer.topk] = ids[i] < 0;
  return dropped;
}

Expected::Expected(const LayerCase& c) {
  const oracle::Layer layer = oracle_layer(c);
  const auto tokens = static_cast<double>(c.tokens());
  std::vector<oracle::Token> walks;
  std::vector<double> load(at(c.spec.all_experts()));
  Vector means(load.size());
  Real balance, z, squares;
  const std::vector<std::vector<bool>> dropped = dropped_slots(c, layer);
  for (std::int64_t t = 0; t < c.tokens(); ++t) {
    walks.push_back(oracle::forward(layer, part(c.x, t, c.tokens()), part(c.residual, t, c.tokens()), dropped[at(t)]));
    for (const std::size_t e : walks.back().ids) load[e] += 1.0 / (tokens * static_cast<double>(layer.topk));
    oracle::add(means, walks.back().scores);
    squares += walks.back().lse * walks.back().lse;
    smallest_gap = std::min(smallest_gap, walks.back().gap);
  }
  for (std::size_t e = 0; e < load.size(); ++e) balance += Real(load[e]) * means[e] / Real(tokens);
  balance = balance * Real(layer.balance * static_cast<double>(load.size()));
  z = squares * Real(layer.z / tokens);

  std::vector<oracle::Network> gradients;
  for (const oracle::Network& net : layer.experts) {
    gradients.push_back(
        {Vector(net.up.size()), Vector(net.down.size()), Vector(net.up_bias.size()), Vector(net.down_bias.size())});
  }
  Vector out, dx, router, shared_up, shared_down, shared_gate, special_mix, special_value;
  for (std::size_t s = 0; s + 1 < c.shards.size(); ++s) {
    Vector shard(layer.router.size());
    const oracle::Network& s_net = layer.shared;
    oracle::SharedGradient shared{{Vector(s_net.up.size()), Vector(s_net.down.size()), {}, {}},
                                  Vector(layer.shared_gate.size()),
                                  Vector(layer.mix.size()),
                                  Vector(layer.value.size())};
    for (std::int64_t t = c.shards[s]; t < c.shards[s + 1]; ++t) {
      const oracle::Token& walk = walks[static_cast<std::size_t>(t)];
      append(out, walk.out);
      append(dx, oracle::backward(layer, walk, part(c.dout, t, c.tokens()), load, tokens, shard, gradients, shared));
    }
    append(router, shard);
    append(shared_up, shared.expert.up), append(shared_down, shared.expert.down), append(shared_gate, shared.gate);
    append(special_mix, shared.mix), append(special_value, shared.value);
  }
  Vector up, down, up_bias, down_bias;
  for (const oracle::Network& g : gradients) {
    append(up, g.up), append(down, g.down), append(up_bias, g.up_bias), append(down_bias, g.down_bias);
  }
  sections = {out,       out,       dx,          router,      up,          down,          up_bias,
              down_bias, shared_up, shared_down, shared_gate, special_mix, special_value, {balance, z}};
}

/// The layer for one token, in twenty lines that anyone can check by eye: softmax, top-k, renormalisation, SwiGLU.
std::vector<double> by_eye(const LayerCase& c, const float* x, const float* residual) {
  const std::int64_t H = c.spec.hidden, F = c.spec.inner, E = c.spec.experts;
  const auto dot = [](const auto* a, const float* b, std::int64_t n) {
    return std::inner_product(a, a + n, b, 0.0, std::plus<>(), [](double p, double q) { return p * q; });
  };
  std::vector<double> score(at(E)), h(at(F)), out(residual, residual + H);
  std::vector<std::int64_t> order(at(E));
  std::iota(order.begin(), order.end(), 0);
  for (const auto e : order) score[at(e)] = std::exp(dot(x, c.router.data() + e * H, H));
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return score[at(a)] > score[at(b)]; });
  order.resize(at(c.spec.topk));
  double total = 0;
  for (const auto e : order) total += score[at(e)];
  for (const auto e : order) {
    const float* gate = c.up.data() + e * 2 * F * H;
    const float* up = gate + F * H;
    const float* down = c.down.data() + e * H * F;
    for (std::int64_t f = 0; f < F; ++f) {
      const double g = dot(x, gate + f * H, H);
      h[at(f)] = g / (1 + std::exp(-g)) * dot(x, up + f * H, H);
    }
    for (std::int64_t i = 0; i < H; ++i) out[at(i)] += score[at(e)] / total * dot(h.data(), down + i * F, F);
  }
  return out;
}

TEST(Oracle, says_what_twenty_lines_say) {
  const LayerCase c({.experts = 5, .topk = 3});
  const Expected expected(c);
  for (std::int64_t t = 0; t < c.tokens(); ++t) {
    const std::int64_t row = t * c.spec.hidden;
    const std::vector<double> out = by_eye(c, c.x.data() + row, c.residual.data() + row);
    for (std::int64_t i = 0; i < c.spec.hidden; ++i) {
      EXPECT_NEAR(expected.sections[0][at(row + i)].value, out[at(i)], 1e-12) << "token " << t;
    }
  }
}

double size_of_all(const Vector& v, double Real::*member) {
  double sum = 0;
  for (const Real& r : v) sum += r.*member * (r.*member);
  return std::sqrt(sum / static_cast<double>(v.size()));
}

// Of hundreds of thousands of elements the worst is 1.9 of Real's errors away.
constexpr double kErrors = 4;

/// Every element lies within the bound on its own error; the worst is printed.
void expect_near(const LayerResult& got, const Expected& expected, const std::string& where) {
  for (std::size_t s = 0; s < got.sections().size(); ++s) {
    const auto& section = got.sections()[s];
    const Vector& want = expected.sections[s];
    ASSERT_EQ(section.count, want.size()) << where << " " << section.name;
    double worst = 0;
    std::size_t at = 0;
    for (std::size_t i = 0; i < want.size(); ++i) {
      const double miss = std::abs(got.at(section.name)[i] - want[i].value);
      const double ratio = miss / (kErrors * want[i].error + 1e-30);  // flushed denormals
      if (!(ratio <= worst)) worst = ratio, at = i;
    }
    if (worst <= 1) continue;
    ADD_FAILURE() << where << ": " << section.name << "[" << at << "] is " << got.at(section.name)[at] << ", should be "
                  << want[at].value << " within " << kErrors * want[at].error;
  }
}

/// A bound as wide as the numbers themselves would accept anything.
void expect_sharp(const Expected& expected, const LayerSpec& spec) {
  EXPECT_GT(expected.smallest_gap, kErrors) << "rounding may change a choice of experts: draw other numbers";
  const double sharp = spec.dtype == DType::f32 ? 5e-4 : 0.75;
  for (const Vector& v : expected.sections) {
    if (v.empty()) continue;
    EXPECT_LT(kErrors * size_of_all(v, &Real::error), sharp * size_of_all(v, &Real::value)) << spec.name();
  }
}

LayerResult run_on(const LayerCase& c, int ranks, const std::string& backend) {
  LayerResult result(c);
  expect_success(run_communicators({.ranks = ranks}, [&](const Communicator& communicator) {
    run_layer(c, Context(communicator, {.threads = 1, .backend = backend}), result);
  }));
  return result;
}

#ifdef __SANITIZE_THREAD__
constexpr int kRanks[] = {1, 3, 4};  // numbers are compared without it, too; here threads are to meet
#else
constexpr int kRanks[] = {1, 2, 3, 4, 7, 8};
#endif

void compare(const LayerSpec& spec) {
  const LayerCase layer_case(spec);
  const Expected expected(layer_case);
  expect_sharp(expected, spec);
  for (const std::string& backend : available_backends()) {
    const LayerResult alone = run_on(layer_case, 1, backend);
    for (const int ranks : kRanks) {
      const LayerResult result = run_on(layer_case, ranks, backend);
      const std::string where = spec.name() + " of " + backend + " on " + std::to_string(ranks) + " ranks";
      expect_near(result, expected, where);
      EXPECT_EQ(result.difference(alone), "") << where << " and on one";
    }
  }
}

/// Ranks of a mesh of `ep` x `tp`.
LayerResult run_on_mesh(const LayerCase& c, const RankSetup& setup, int ep, int tp) {
  LayerResult result(c);
  expect_success(run_communicators(setup, [&](const Communicator& communicator) {
    const Mesh mesh(communicator, {{"ep", ep}, {"tp", tp}});
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    run_layer(c, context.on(mesh.group("ep")), result, mesh.group("tp"));
    barrier(context);
  }));
  return result;
}

TEST(LayerSlices, give_the_numbers_of_whole_experts_on_any_mesh) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const LayerSpec specs[] = {{.experts = 5, .topk = 3, .bias = true, .dtype = dtype},
                               {.experts = 5,
                                .activation = Activation::gelu,
                                .weights_on = WeightsOn::inner,
                                .dtype = dtype,
                                .recompute = true},
                               {.experts = 5, .dtype = dtype, .shared_inner = 21, .shared_gate = true},
                               {.experts = 5, .topk = 4, .dtype = dtype, .special = {1, 1, 2}}};
    for (const LayerSpec& spec : specs) {
      const LayerCase c(spec);
      const Expected expected(c);
      for (const auto& [ep, tp] : std::vector<std::pair<int, int>>{{1, 2}, {1, 3}, {2, 2}, {2, 3}, {4, 2}}) {
        const std::string where = spec.name() + " on ep=" + std::to_string(ep) + ",tp=" + std::to_string(tp);
        const LayerResult result = run_on_mesh(c, {.ranks = ep * tp}, ep, tp);
        expect_near(result, expected, where);
        if (ep == 2 && tp == 2) {
          const RankSetup messages{.kind = Kind::shm, .ranks = 4, .mapping = false};
          EXPECT_EQ(run_on_mesh(c, messages, ep, tp).difference(result), "") << where;
        }
        if (ep > 1) {
          EXPECT_EQ(run_on_mesh(c, {.ranks = tp}, 1, tp).difference(result), "") << where << " and on ep=1";
        }
      }
    }
  }
}

struct Choice {
  std::int64_t experts, topk;
  DType dtype;
};
std::vector<Choice> choices() {
  std::vector<Choice> all;
  for (const std::int64_t experts : {1, 5, 8, 64})
    for (const std::int64_t topk : {1, 2, 8})
      for (const DType dtype : {DType::f32, DType::bf16})
        if (topk <= experts) all.push_back({experts, topk, dtype});
  return all;
}
std::string name_of(const Choice& c) {
  return "E" + std::to_string(c.experts) + "_K" + std::to_string(c.topk) + "_" + std::string(name(c.dtype));
}
void PrintTo(const Choice& c, std::ostream* out) { *out << name_of(c); }

class LayerNumbers : public testing::TestWithParam<Choice> {};
INSTANTIATE_TEST_SUITE_P(all, LayerNumbers, testing::ValuesIn(choices()),
                         [](const auto& test) { return name_of(test.param); });

TEST_P(LayerNumbers, are_those_of_a_plain_loop_on_any_number_of_ranks) {
  const auto [experts, topk, dtype] = GetParam();
  for (const Activation activation : {Activation::swiglu, Activation::gelu}) {
    for (const bool bias : {false, true}) {
      compare({.experts = experts, .topk = topk, .activation = activation, .bias = bias, .dtype = dtype});
    }
  }
}

TEST(LayerSkew, agrees_where_one_expert_takes_everything) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    compare({.experts = 8, .topk = 1, .bias = true, .dtype = dtype, .hot = 6});
    compare({.experts = 5, .topk = 2, .activation = Activation::gelu, .dtype = dtype, .hot = 3});
  }
}

TEST(LayerSkew, agrees_where_an_expert_gets_no_token) {
  for (const DType dtype : {DType::f32, DType::bf16}) compare({.topk = 2, .bias = true, .dtype = dtype, .cold = 5});
}

TEST(LayerCapacity, agrees_where_slots_are_dropped) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const CapacityPolicy policy : {CapacityPolicy::drop_by_position, CapacityPolicy::drop_by_score}) {
      compare({.topk = 3, .bias = true, .dtype = dtype, .capacity = {.policy = policy, .factor = 0.75}});
      compare({.experts = 5, .topk = 2, .dtype = dtype, .renormalise = false, .capacity = {policy, {}, 0, 7}});
    }
  }
}

TEST(LayerScores, agrees_without_renormalisation) {
  for (const DType dtype : {DType::f32, DType::bf16}) compare({.topk = 3, .dtype = dtype, .renormalise = false});
}

TEST(LayerWeights, agree_before_the_second_product_and_on_the_input) {
  for (const WeightsOn on : {WeightsOn::inner, WeightsOn::input}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      compare({.experts = 5, .topk = 3, .bias = true, .weights_on = on, .dtype = dtype, .renormalise = false});
    }
  }
}

TEST(LayerShared, agrees_with_and_without_a_gate) {
  for (const bool gate : {false, true}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      compare({.experts = 5, .topk = 2, .dtype = dtype, .shared_inner = 29, .shared_gate = gate});
    }
  }
  compare({.experts = 5, .activation = Activation::gelu, .recompute = true, .shared_inner = 70, .shared_gate = true});
}

TEST(LayerSpecial, agrees_with_zero_copy_and_constant_experts) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    compare({.experts = 5, .topk = 3, .bias = true, .dtype = dtype, .special = {.zero = 1, .copy = 2, .constant = 2}});
    compare({.experts = 2, .topk = 4, .dtype = dtype, .renormalise = false, .special = {.constant = 3}});
    compare({.experts = 5,
             .topk = 3,
             .weights_on = WeightsOn::input,
             .dtype = dtype,
             .recompute = true,
             .shared_inner = 29,
             .shared_gate = true,
             .special = {.zero = 2, .copy = 1, .constant = 1}});
    for (const CapacityPolicy policy : {CapacityPolicy::drop_by_position, CapacityPolicy::drop_by_score}) {
      compare({.experts = 5,
               .topk = 3,
               .dtype = dtype,
               .capacity = {.policy = policy, .factor = 0.5},
               .special = {.zero = 1, .copy = 1, .constant = 1}});
    }
  }
}

TEST(LayerActivations, give_the_numbers_of_their_formulas) {
  for (const NamedActivation& named : kActivations) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      LayerSpec spec{.experts = 5, .activation = named.activation, .numbers = named.numbers, .dtype = dtype};
      if (named.name == "clamped_swiglu") spec.numbers.limit = 1;  // so that many numbers lie beyond it
      compare(spec);
    }
  }
}

}  // namespace
}  // namespace expar::test
