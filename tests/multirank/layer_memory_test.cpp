// Decoding takes no memory once it has seen as many rows as can come.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include <expar/collectives.h>
#include <expar/layer.h>
#include <expar/mesh.h>
#include <expar/random.h>

#include "tests/fastest_backend.h"
#include "tests/multirank/allocations.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

constexpr std::int64_t kTokens = 8;  // of each rank

struct Case {
  const char* name;
  MoeLayerOptions options;
  int slices = 1;  // of each expert
};

std::vector<Case> cases() {
  MoeLayerOptions usual;
  usual.hidden = 64;
  usual.inner = 32;
  usual.dtype = DType::bf16;
  usual.bound = kTokens;
  usual.inference = true;
  std::vector<Case> all;
  const auto add = [&](const char* name, const RouterOptions& router) -> MoeLayerOptions& {
    usual.router = router;
    return all.emplace_back(Case{name, usual}).options;
  };
  add("softmax", router_preset("mixtral", 32, 8));
  add("softmax in f32", router_preset("qwen2_moe", 32, 4)).dtype = DType::f32;
  RouterOptions grouped = router_preset("deepseek_v3", 32, 8);
  grouped.groups = 8;
  grouped.groups_used = 4;
  add("sigmoid with groups", grouped);
  add("rows as int8", grouped).payload = DType::int8;
  MoeLayerOptions& special = add("special experts", router_preset("mixtral", 36, 8));
  special.special = {.zero = 1, .copy = 1, .constant = 2};
  MoeLayerOptions& shared = add("shared experts and biases", router_preset("gpt_oss", 32, 4));
  shared.bias = shared.shared_gate = true;
  shared.shared_inner = 32;
  MoeLayerOptions& apart = add("shared experts on a rank of their own", router_preset("mixtral", 32, 4));
  apart.shared_inner = 32;
  apart.shared_ranks = 1;
  add("slices of experts", router_preset("mixtral", 32, 4)).shared_inner = 32;
  all.back().slices = 2;
  return all;
}

/// The same on every rank.
std::int64_t max_over_ranks(const Context& context, std::int64_t mine) {
  const Array all(DType::int64, {context.size()});
  all_gather(context, ConstTensor(&mine, {1}), all);
  return *std::max_element(all.as<std::int64_t>(), all.as<std::int64_t>() + context.size());
}

class Memory : public testing::TestWithParam<RankSetup> {};
INSTANTIATE_TEST_SUITE_P(Layer, Memory,
                         testing::Values(RankSetup{.ranks = 1}, RankSetup{.ranks = 2}, RankSetup{.ranks = 4},
                                         RankSetup{.kind = Kind::shm, .ranks = 2}),
                         [](const auto& test) { return test.param.name(); });

TEST_P(Memory, of_decoding_is_taken_in_the_first_calls) {
  for (const Case& c : cases()) {
    if (GetParam().ranks % c.slices != 0) continue;
    expect_success(run_communicators(GetParam(), [&](const Communicator& communicator) {
      const Mesh mesh(communicator, {{"ep", communicator.size() / c.slices}, {"tp", c.slices}});
      const Context all(communicator, {.threads = 1, .backend = fastest_backend()});
      const Context context = all.on(mesh.group("ep"));
      MoeLayerOptions options = c.options;
      options.tensor = mesh.group("tp");
      if (options.shared_ranks >= context.size()) return;  // which leaves no rank for the other experts
      MoeLayer layer(context, options);
      layer.initialise(3, "layer");
      const Array x(options.dtype, {kTokens, options.hidden}), out(options.dtype, x.view().shape());
      const Random random(4, "x" + std::to_string(context.rank()));
      const auto step = [&](int i, std::int64_t tokens, const MoeInputs& inputs) {
        const auto first = static_cast<std::uint64_t>(i * x.view().elements());
        for (std::int64_t j = 0; j < x.view().elements(); ++j) {
          const float value = random.normal(first + static_cast<std::uint64_t>(j));
          if (options.dtype == DType::f32) x.as<float>()[j] = value;
          if (options.dtype == DType::bf16) x.as<bf16>()[j] = bf16(value);
        }
        layer.forward(context, x.view().rows(0, tokens), out.view().rows(0, tokens), {}, inputs);
      };
      const std::int64_t at_first = allocations();
      // The most rows that can come: every slot of every rank goes to one rank, to each in turn.
      const Array ids(DType::int32, {kTokens, options.router.topk});
      for (int rank = 0; rank < context.size(); ++rank) {
        const ExpertRange range = experts_of(rank, context.size(), options.routed_experts());
        for (std::int64_t i = 0; i < ids.view().elements(); ++i) {
          ids.as<std::int32_t>()[i] =
              static_cast<std::int32_t>(range.first + i % std::min(range.count, ids.view().size(1)));
        }
        step(rank, kTokens, {.ids = ids});
      }
      step(context.size(), kTokens, {});
      EXPECT_GT(allocations(), at_first) << "nothing was counted";
      // A rank that loses its core while others go on may hold more blocks than ever before: then a stretch of calls
      // takes some memory, and the next ones none.
      std::int64_t taken = 1;
      for (int stretch = 0; stretch < 8 && taken > 0; ++stretch) {
        const std::int64_t before = allocations();
        for (int i = 100; i < 200; ++i) step(i, (i + context.rank()) % (kTokens + 1), {});
        taken = max_over_ranks(all, allocations() - before);  // all go on or none: slices meet in every call
      }
      EXPECT_EQ(taken, 0) << c.name;
      barrier(all);  // a rank that leaves early would be the beginning of an error here
    }));
  }
}

}  // namespace
}  // namespace expar::test
