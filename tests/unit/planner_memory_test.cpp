// The memory that is planned beside the arrays that a layer has.
#include <algorithm>
#include <cstdint>
#include <vector>

#include <expar/expar.h>
#include <gtest/gtest.h>

#include "planner/planner.h"
#include "src/layer/record.h"
#include "tests/unit/planner_testing.h"

namespace expar::planner {
namespace {

/// What a layer over threads really holds, on the rank that holds most, after a forward and a backward pass.
struct Held {
  std::int64_t weights_and_gradients = 0, optimizer = 0, activations = 0, arena = 0, packed = 0;
};

template <class... Arrays>
std::int64_t bytes_of(const Arrays&... arrays) {
  return static_cast<std::int64_t>(((arrays.absent() ? 0 : arrays.byte_size()) + ...));
}

Held held_by_a_layer(const Question& question, const MoeLayerOptions& given) {
  const Grid& grid = question.grid;
  const int tp = grid.size("tp");
  std::vector<Held> all(static_cast<std::size_t>(grid.ranks()));
  run_threads(grid.ranks(), [&](const Communicator& communicator) {
    const Context whole(communicator);
    const Mesh mesh(communicator, {{"ep", grid.size("ep")}, {"tp", tp}});
    const Context context = whole.on(mesh.group("ep"));
    MoeLayerOptions options = given;
    options.tensor = mesh.group("tp");
    // Ranks along tp have the tokens of all of them.
    const std::int64_t tokens = question.tokens * tp;
    MoeLayer layer(context, options);
    layer.initialise(1, "moe");
    const Array x(options.dtype, {tokens, options.hidden}), out(options.dtype, {tokens, options.hidden});
    const Array dx(options.dtype, {tokens, options.hidden});
    const std::vector<std::int64_t> shards = {0, tokens};
    MoeRecord record;
    const std::int64_t slots = tokens * options.router.topk;
    const ConstTensor ids(question.ids.data() + context.rank() * slots, Shape{tokens, options.router.topk});
    layer.forward(context, x, out, {}, shards, record, {.ids = ids});
    Held& held = all[static_cast<std::size_t>(communicator.rank())];
    held.activations = bytes_of(x.view(), record.routing.ids, record.routing.weights, record.routing.scores,
                                record.routing.top, record.routing.logsumexp, record.kept->experts.pre,
                                record.kept->experts.h, record.kept->shared.experts.pre, record.kept->shared.experts.h);
    if (options.shared_inner > 0) held.activations += bytes_of(record.kept->shared.y);
    if (options.shared_gate) held.activations += bytes_of(record.kept->shared.gate);
    held.arena = bytes_of(record.kept->inbox.rows(), record.kept->y.rows());
    layer.backward(context, record, out, dx);
    std::vector<Parameter> parameters = layer.expert_parameters("moe");
    for (const Parameter& parameter : layer.dense_parameters("moe")) parameters.push_back(parameter);
    AdamW adamw;
    for (const AdamWMoments& moments : adamw.moments(parameters)) held.optimizer += bytes_of(moments.m, moments.v);
    held.weights_and_gradients = static_cast<std::int64_t>(layer.parameter_bytes());

    options.inference = true;
    held.packed = static_cast<std::int64_t>(MoeLayer(context, options).parameter_bytes());
  });
  return *std::max_element(all.begin(), all.end(), [](const Held& a, const Held& b) {
    return a.weights_and_gradients + a.optimizer + a.activations + a.arena <
           b.weights_and_gradients + b.optimizer + b.activations + b.arena;
  });
}

void expect_memory_of_a_layer(const LayerSizes& sizes, std::vector<MeshDim> dims) {
  Question question{.sizes = sizes, .tokens = 9, .grid = Grid(std::move(dims), 0), .ids = {}};
  draw_ids(question);
  const MoeLayerOptions options{.hidden = sizes.hidden,
                                .inner = sizes.inner,
                                .router = {.experts = sizes.experts, .topk = sizes.topk},
                                .activation = sizes.gated ? Activation::swiglu : Activation::gelu,
                                .bias = sizes.bias,
                                .shared_inner = sizes.shared_inner,
                                .shared_gate = sizes.shared_gate,
                                .dtype = sizes.dtype};
  const Memory memory = plan(question).memory;
  const Held held = held_by_a_layer(question, options);
  EXPECT_EQ(memory.weights + memory.gradients, held.weights_and_gradients);
  EXPECT_EQ(memory.optimizer, held.optimizer);
  EXPECT_EQ(memory.activations, held.activations);
  EXPECT_EQ(memory.arena, held.arena);
  EXPECT_EQ(memory.packed_weights, held.packed) << "of sizes that fill whole panels";
}

TEST(Planner, knows_the_memory_that_a_layer_takes) {
  const LayerSizes plain{.hidden = 64, .inner = 128, .experts = 7, .topk = 3, .dtype = DType::f32};
  const LayerSizes full{.hidden = 64,
                        .inner = 64,
                        .experts = 8,
                        .topk = 2,
                        .dtype = DType::bf16,
                        .gated = true,
                        .bias = true,
                        .shared_inner = 192,
                        .shared_gate = true};
  LayerSizes ungated = plain;
  ungated.gated = false;
  for (const int ep : {1, 2, 3}) {
    for (const int tp : {1, 2}) {
      for (const LayerSizes& sizes : {plain, full, ungated}) {
        SCOPED_TRACE(testing::Message() << ep << " x " << tp << ", " << name(sizes.dtype));
        expect_memory_of_a_layer(sizes, {{"ep", ep}, {"tp", tp}});
      }
    }
  }
}

TEST(Planner, divides_the_experts_of_a_rank_among_its_tensor_parallel_group) {
  const auto memory_on = [](std::vector<MeshDim> dims) { return plan(question_of(std::move(dims), 0, 8, 2)).memory; };
  const Memory whole = memory_on({{"ep", 2}});
  const Memory halved = memory_on({{"ep", 2}, {"tp", 7}});
  // F = 7, so that a rank has one seventh of three [4, 7, 10] matrices and all of the router.
  EXPECT_EQ(whole.optimizer, 8 * (3 * 4 * 7 * 10 + 8 * 10));
  EXPECT_EQ(halved.optimizer, 8 * (3 * 4 * 1 * 10 + 8 * 10));
}

}  // namespace
}  // namespace expar::planner
