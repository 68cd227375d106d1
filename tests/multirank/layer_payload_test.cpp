// The layer with payloads: output and gradients are the same bytes on any number of ranks, and close to those without.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/fastest_backend.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

LayerResult run_on(const LayerCase& c, const RankSetup& setup) {
  LayerResult result(c);
  expect_success(run_communicators(setup, [&](const Communicator& communicator) {
    run_layer(c, Context(communicator, {.threads = 1, .backend = fastest_backend()}), result);
  }));
  return result;
}

struct Travel {
  DType dtype, payload, gradient;
  double change;  // of the output's norm, at most
};

class LayerPayload : public testing::TestWithParam<Travel> {};
INSTANTIATE_TEST_SUITE_P(all, LayerPayload,
                         testing::Values(Travel{DType::f32, DType::int8, DType::fp8_e4m3, 0.03},
                                         Travel{DType::bf16, DType::fp8_e4m3, DType::int8, 0.06},
                                         Travel{DType::f32, DType::f16, DType::bf16, 0.002}),
                         [](const auto& test) { return std::string(name(test.param.payload)); });

TEST_P(LayerPayload, gives_the_same_bytes_on_any_number_of_ranks) {
  LayerSpec spec{.dtype = GetParam().dtype};
  spec.payload = GetParam().payload;
  spec.gradient_payload = GetParam().gradient;
  spec.bound = 37;  // inference alone: run_layer compares it with training, which has exact plans
  const LayerCase c(spec);
  const LayerResult alone = run_on(c, {.ranks = 1});
  for (const RankSetup& setup : all_setups({2, 3, 4, 7, 8})) EXPECT_EQ(run_on(c, setup).difference(alone), "") << setup;
}

TEST_P(LayerPayload, rounds_tokens_and_gradients_only_where_asked) {
  LayerSpec spec{.dtype = GetParam().dtype};
  const LayerCase plain(spec);
  spec.payload = GetParam().payload;
  const LayerCase forward(spec);
  spec.payload = {};
  spec.gradient_payload = GetParam().gradient;
  const LayerCase backward(spec);
  const LayerResult exact = run_on(plain, {.ranks = 2}), tokens = run_on(forward, {.ranks = 2}),
                    gradients = run_on(backward, {.ranks = 2});
  double off = 0, norm = 0;
  for (std::size_t i = 0; i < plain.x.size(); ++i) {
    off += std::pow(tokens.at("out")[i] - exact.at("out")[i], 2);
    norm += std::pow(exact.at("out")[i] - plain.residual[i], 2);
    EXPECT_EQ(gradients.at("out")[i], exact.at("out")[i]);
  }
  EXPECT_GT(off, 0);
  EXPECT_LT(std::sqrt(off / norm), GetParam().change);
  EXPECT_NE(gradients.difference(exact), "");
}

}  // namespace
}  // namespace expar::test
