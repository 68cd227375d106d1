// The layer's losses over several micro-batches of one optimizer step, against plain loops in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tests/fastest_backend.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

constexpr float kBalance = 8.0F;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

/// What one micro-batch gave, in global order.
struct Micro {
  std::vector<std::int32_t> ids;  // [T, K] that the router wanted
  std::vector<float> scores, dx;  // [T, E], [T, H]
  std::vector<float> router;      // [S, E, H]
  float balance = 0;
  std::vector<std::int64_t> so_far;  // [E]
  std::int64_t tokens_so_far = 0;
};

/// The shards of the whole batch that a micro-batch has.
struct Part {
  std::size_t first, count;
};
constexpr Part kParts[] = {{0, 5}, {5, 3}};

MoeLayerOptions options_of(const LayerCase& c) {
  MoeLayerOptions options = c.options();
  options.router.balance = kBalance;
  options.router.z = 0;
  return options;
}

/// Two micro-batches, of which each rank has some shards; the gradient is that of the losses alone.
std::vector<Micro> accumulate(const LayerCase& c, int ranks) {
  const std::int64_t H = c.spec.hidden, E = c.spec.experts, K = c.spec.topk;
  std::vector<Micro> micros(std::size(kParts));
  for (std::size_t m = 0; m < micros.size(); ++m) {
    const std::int64_t tokens = c.shards[kParts[m].first + kParts[m].count] - c.shards[kParts[m].first];
    micros[m].ids.resize(at(tokens * K));
    micros[m].scores.resize(at(tokens * E));
    micros[m].dx.resize(at(tokens * H));
    micros[m].router.resize(kParts[m].count * at(E * H));
  }
  expect_success(run_communicators({.ranks = ranks}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    MoeLayer layer(context, options_of(c));
    c.fill(layer);
    MoeRecord record;
    for (std::size_t m = 0; m < micros.size(); ++m) {
      const auto edge = [&](int rank) { return kParts[m].count * at(rank) / at(ranks); };
      const std::size_t begin = edge(context.rank()), end = edge(context.rank() + 1);
      const LayerCase::Held held{kParts[m].first + begin, end - begin};
      std::vector<std::int64_t> shards;
      for (std::size_t s = 0; s <= held.count; ++s) shards.push_back(c.shards[held.first + s] - c.shards[held.first]);
      const Array x = rows_of(c, c.x, held);
      const Array out(DType::f32, x.view().shape());
      const Array none(DType::f32, x.view().shape());
      const Array dx(DType::f32, x.view().shape());
      MoeInputs inputs;
      if (m > 0) {
        inputs.losses.counts_so_far = record.losses.counts_so_far;
        inputs.losses.tokens_so_far = record.losses.tokens_so_far;
      }
      layer.forward(context, x, out, {}, shards, record, inputs);
      layer.backward(context, record, none, dx);
      Micro& to = micros[m];
      const std::int64_t row = c.shards[held.first] - c.shards[kParts[m].first];
      std::copy_n(record.routing.ids.as<std::int32_t>(), record.routing.ids.elements(), to.ids.data() + row * K);
      to_f32(record.routing.scores, to.scores.data() + row * E);
      to_f32(dx, to.dx.data() + row * H);
      to_f32(layer.dense_shard_gradients().front(), to.router.data() + at(E * H) * begin);
      if (context.rank() > 0) continue;
      to.balance = record.losses.balance;
      to.so_far = record.losses.counts_so_far;
      to.tokens_so_far = record.losses.tokens_so_far;
    }
  }));
  return micros;
}

/// Of the loss E sum_e f_e mean_t s[t, e] by the router's weights, the fractions f being constants.
void expect_router_gradient(const LayerCase& c, std::size_t part, const Micro& micro,
                            const std::vector<double>& fractions) {
  const std::int64_t H = c.spec.hidden, E = c.spec.experts;
  const auto tokens = static_cast<std::int64_t>(micro.scores.size()) / E;
  const float* x = c.x.data() + c.shards[kParts[part].first] * H;
  std::vector<double> want(at(E * H)), got(at(E * H));
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float* s = micro.scores.data() + t * E;
    double mean = 0;
    for (std::int64_t e = 0; e < E; ++e) mean += s[e] * fractions[at(e)];
    for (std::int64_t e = 0; e < E; ++e) {
      const double dz =
          double{kBalance} * static_cast<double>(E) / static_cast<double>(tokens) * s[e] * (fractions[at(e)] - mean);
      for (std::int64_t h = 0; h < H; ++h) want[at(e * H + h)] += dz * x[t * H + h];
    }
  }
  for (std::size_t i = 0; i < micro.router.size(); ++i) got[i % got.size()] += micro.router[i];
  double largest = 0;
  for (const double value : want) largest = std::max(largest, std::abs(value));
  for (std::size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-5 * largest) << "weight " << i;
}

class LayerLosses : public testing::TestWithParam<LayerSpec> {};
INSTANTIATE_TEST_SUITE_P(all, LayerLosses,
                         testing::Values(LayerSpec{.experts = 6, .topk = 2},
                                         LayerSpec{
                                             .experts = 6,
                                             .topk = 2,
                                             .capacity = {.policy = CapacityPolicy::drop_by_position, .factor = 0.75}}),
                         [](const auto& test) { return test.param.name(); });

TEST_P(LayerLosses, balance_a_step_of_several_micro_batches) {
  const LayerCase c(GetParam());
  const std::int64_t E = c.spec.experts, K = c.spec.topk;
  const std::vector<Micro> micros = accumulate(c, 1);
  std::vector<std::int64_t> counts(at(E));
  std::int64_t all = 0;
  for (std::size_t m = 0; m < micros.size(); ++m) {
    const Micro& micro = micros[m];
    const auto tokens = static_cast<std::int64_t>(micro.scores.size()) / E;
    for (const std::int32_t id : micro.ids) ++counts[at(id)];
    all += tokens;
    EXPECT_EQ(micro.so_far, counts);
    EXPECT_EQ(micro.tokens_so_far, all);

    double balance = 0;
    std::vector<double> fractions(at(E));
    for (std::int64_t e = 0; e < E; ++e) {
      fractions[at(e)] = static_cast<double>(counts[at(e)]) / static_cast<double>(all * K);
      for (std::int64_t t = 0; t < tokens; ++t)
        balance += kBalance * E * fractions[at(e)] * micro.scores[at(t * E + e)] / static_cast<double>(tokens);
    }
    EXPECT_NEAR(micro.balance, balance, 1e-6 * balance) << "micro-batch " << m;
    expect_router_gradient(c, m, micro, fractions);
  }
  // Without what was before, the second would be another number.
  std::vector<std::int64_t> second(at(E));
  for (const std::int32_t id : micros[1].ids) ++second[at(id)];
  EXPECT_NE(second, counts);
}

TEST_P(LayerLosses, of_micro_batches_have_the_same_bytes_on_any_number_of_ranks) {
  const LayerCase c(GetParam());
  const std::vector<Micro> alone = accumulate(c, 1);
  for (const int ranks : {2, 3, 4}) {
    const std::vector<Micro> got = accumulate(c, ranks);
    for (std::size_t m = 0; m < alone.size(); ++m) {
      EXPECT_EQ(std::memcmp(&got[m].balance, &alone[m].balance, sizeof(float)), 0) << ranks << " ranks";
      EXPECT_EQ(std::memcmp(got[m].dx.data(), alone[m].dx.data(), alone[m].dx.size() * sizeof(float)), 0) << ranks;
      EXPECT_EQ(std::memcmp(got[m].router.data(), alone[m].router.data(), alone[m].router.size() * sizeof(float)), 0)
          << ranks;
    }
  }
}

TEST(LayerLosses, are_of_the_sequences_that_they_are_given) {
  const LayerCase c({.experts = 6, .topk = 2});
  run_threads(1, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    MoeLayerOptions options = options_of(c);
    options.router.sequence_balance = kBalance;
    MoeLayer layer(context, options);
    c.fill(layer);
    const ConstTensor x(c.x.data(), {c.tokens(), c.spec.hidden});
    const Array out(DType::f32, x.shape());
    const std::vector<std::int64_t> one{0, c.tokens()};
    MoeRecord record;
    layer.forward(context, x, out, {}, c.shards, record, {.losses = {.sequences = one}});
    EXPECT_NEAR(record.losses.sequence_balance, record.losses.balance, 1e-6 * record.losses.balance);
    layer.forward(context, x, out, {}, c.shards, record);  // each shard is one
    EXPECT_GT(record.losses.sequence_balance, 1.01F * record.losses.balance);
  });
}

TEST(LayerLosses, count_what_the_router_wanted_whatever_became_of_it) {
  const LayerCase c({.experts = 6, .topk = 2});
  run_threads(2, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    const LayerCase::Held held = c.held(context.rank(), 2);
    const Array x = rows_of(c, c.x, held);
    const Array out(DType::f32, x.view().shape());
    std::vector<std::int64_t> shards;
    for (std::size_t s = 0; s <= held.count; ++s) shards.push_back(c.shards[held.first + s] - c.shards[held.first]);
    const auto losses_with = [&](const CapacityOptions& capacity) {
      MoeLayerOptions options = options_of(c);
      options.capacity = capacity;
      options.router.sequence_balance = 2.0F;
      MoeLayer layer(context, options);
      c.fill(layer);
      MoeRecord record;
      layer.forward(context, x, out, {}, shards, record);
      return record.losses;
    };
    const RouterLosses free = losses_with({});
    for (const CapacityPolicy policy : {CapacityPolicy::reroute, CapacityPolicy::drop_by_score}) {
      const RouterLosses bound = losses_with({.policy = policy, .factor = 0.75});
      EXPECT_EQ(bound.balance, free.balance);
      EXPECT_EQ(bound.sequence_balance, free.sequence_balance);
      EXPECT_EQ(bound.dscores, free.dscores);
    }
  });
}

}  // namespace
}  // namespace expar::test
