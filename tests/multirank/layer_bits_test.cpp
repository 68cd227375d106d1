// The layer's bytes: the same on any number of ranks, by any transport, with mapping on and off, for any thread count.
#include <gtest/gtest.h>

#include <bit>
#include <cfenv>
#include <cstdlib>

#include <expar/registry.h>

#include "tests/fastest_backend.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

LayerResult run_on(const LayerCase& c, const RankSetup& setup, const ContextOptions& options) {
  LayerResult result(c);
  expect_success(run_communicators(
      setup, [&](const Communicator& communicator) { run_layer(c, Context(communicator, options), result); }));
  return result;
}

std::vector<LayerSpec> specs() {
  // Wide enough for several tiles and tasks per kernel.
  return {{.experts = 8, .topk = 2, .bias = true, .hidden = 136, .inner = 72},
          {.experts = 8, .topk = 2, .dtype = DType::bf16, .hidden = 136, .inner = 72},
          {.experts = 5, .topk = 3, .activation = Activation::gelu, .bias = true, .dtype = DType::bf16, .hot = 1},
          {.experts = 8, .bias = true, .weights_on = WeightsOn::inner, .dtype = DType::bf16},
          {.experts = 8, .weights_on = WeightsOn::input, .dtype = DType::bf16, .recompute = true},
          {.experts = 5, .dtype = DType::bf16, .shared_inner = 70, .shared_gate = true},
          {.experts = 5, .topk = 4, .dtype = DType::bf16, .hidden = 136, .special = {1, 1, 2}}};
}

class LayerBits : public testing::TestWithParam<LayerSpec> {};
INSTANTIATE_TEST_SUITE_P(all, LayerBits, testing::ValuesIn(specs()),
                         [](const auto& test) { return test.param.name(); });

TEST_P(LayerBits, do_not_depend_on_ranks_transport_or_mapping) {
  const LayerCase layer_case(GetParam());
  const LayerResult alone = run_on(layer_case, {.ranks = 1}, {.threads = 1, .backend = fastest_backend()});
  for (const RankSetup& setup : all_setups()) {
    EXPECT_EQ(run_on(layer_case, setup, {.threads = 1, .backend = fastest_backend()}).difference(alone), "")
        << setup.name();
  }
}

TEST_P(LayerBits, do_not_depend_on_the_number_of_threads) {
  const LayerCase layer_case(GetParam());
  const LayerResult alone = run_on(layer_case, {.ranks = 1}, {.threads = 1, .backend = fastest_backend()});
  for (const int ranks : {1, 3}) {
    for (const int threads : {2, 3}) {
      EXPECT_EQ(
          run_on(layer_case, {.ranks = ranks}, {.threads = threads, .backend = fastest_backend()}).difference(alone),
          "")
          << ranks << " ranks of " << threads << " threads";
    }
  }
}

TEST_P(LayerBits, do_not_depend_on_what_is_kept_for_the_backward_pass) {
  const LayerSpec spec = GetParam();
  LayerSpec other = spec;
  other.recompute = !spec.recompute;
  const RankSetup setup{.ranks = 3};
  const ContextOptions options{.threads = 1, .backend = fastest_backend()};
  EXPECT_EQ(run_on(LayerCase(other), setup, options).difference(run_on(LayerCase(spec), setup, options)), "");
}

/// Sets EXPAR_ISA until its end.
class Isa {
 public:
  explicit Isa(const std::string& isa) { setenv("EXPAR_ISA", isa.c_str(), 1); }
  ~Isa() { unsetenv("EXPAR_ISA"); }
};

TEST_P(LayerBits, hold_for_every_backend_and_instruction_set) {
  const LayerCase layer_case(GetParam());
  for (const std::string& backend : available_backends()) {
    for (const std::string& isa : available_isas(backend)) {
      const Isa chosen(isa);
      const LayerResult alone = run_on(layer_case, {.ranks = 1}, {.threads = 1, .backend = backend});
      for (const int ranks : {2, 4}) {
        EXPECT_EQ(run_on(layer_case, {.ranks = ranks}, {.threads = 2, .backend = backend}).difference(alone), "")
            << backend << " " << isa << " on " << ranks << " ranks";
      }
    }
  }
}

TEST_P(LayerBits, hold_where_ranks_have_different_instruction_sets) {
  const std::string backend = fastest_backend();
  const std::vector<std::string> isas = available_isas(backend);
  if (isas.size() < 2) GTEST_SKIP() << "this processor runs one instruction set";
  const int ranks = static_cast<int>(isas.size());
  const LayerCase layer_case(GetParam());
  const LayerResult alone = run_on(layer_case, {.ranks = 1}, {.threads = 1, .backend = backend});
  // Rank 0 has them all, the last has the last alone: that is the one which all of them have.
  LayerResult mixed(layer_case);
  expect_success(run_communicators({.kind = Kind::shm, .ranks = ranks}, [&](const Communicator& communicator) {
    const Isa best(isas[static_cast<std::size_t>(communicator.rank())]);
    const Context context(communicator, {.threads = 1, .backend = backend});
    EXPECT_EQ(context.kernels().isa, isas.back());
    run_layer(layer_case, context, mixed);
  }));
  EXPECT_EQ(mixed.difference(alone), "");
  // Without that rank, the last but one.
  expect_success(run_communicators({.kind = Kind::shm, .ranks = ranks - 1}, [&](const Communicator& communicator) {
    const Isa best(isas[static_cast<std::size_t>(communicator.rank())]);
    EXPECT_EQ(Context(communicator, {.backend = backend}).kernels().isa, isas[isas.size() - 2]);
  }));
}

TEST_P(LayerBits, do_not_depend_on_the_rounding_mode_of_the_caller) {
  const LayerCase layer_case(GetParam());
  const LayerResult usual = run_on(layer_case, {.ranks = 2}, {.threads = 2, .backend = fastest_backend()});
  LayerResult upward(layer_case);
  expect_success(run_communicators({.ranks = 2}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 2, .backend = fastest_backend()});
    std::fesetround(FE_UPWARD);
    run_layer(layer_case, context, upward);
    std::fesetround(FE_TONEAREST);
  }));
  EXPECT_EQ(upward.difference(usual), "");
}

TEST_P(LayerBits, differ_where_a_token_differs_in_its_last_bit) {
  LayerCase layer_case(GetParam());
  const LayerResult before = run_on(layer_case, {.ranks = 2}, {.threads = 1, .backend = fastest_backend()});
  const std::uint32_t last = layer_case.spec.dtype == DType::f32 ? 1U : 0x10000U;
  float& element = layer_case.x[5];
  element = std::bit_cast<float>(std::bit_cast<std::uint32_t>(element) ^ last);
  EXPECT_NE(run_on(layer_case, {.ranks = 2}, {.threads = 1, .backend = fastest_backend()}).difference(before), "");
}

}  // namespace
}  // namespace expar::test
