// Experts in slices: drawn, written and refused as whole ones are. That they compute the same, layer_oracle_test shows.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include <expar/mesh.h>

#include "tests/fastest_backend.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

/// Runs `body` on a mesh of `ep` x 3 with options for a layer of `c` in slices.
template <class Body>
std::vector<Outcome> run_mesh(const LayerCase& c, int ep, const Body& body) {
  return run_communicators({.ranks = ep * 3}, [&](const Communicator& communicator) {
    const Mesh mesh(communicator, {{"ep", ep}, {"tp", 3}});
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    MoeLayerOptions options = c.options();
    options.tensor = mesh.group("tp");
    body(context.on(mesh.group("ep")), options);
  });
}

TEST(LayerSlices, draw_the_parameters_of_whole_experts) {
  for (const Activation activation : {Activation::swiglu, Activation::relu2}) {
    const LayerCase c({.experts = 5, .activation = activation, .bias = true});
    std::vector<std::vector<float>> whole;
    expect_success(run_communicators({.ranks = 1}, [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1});
      MoeLayer layer(context, c.options());
      layer.initialise(3, "layers.0");
      for (const Parameter& p : layer.expert_parameters("")) {
        whole.emplace_back(p.value.as<float>(), p.value.as<float>() + p.value.elements());
      }
    }));
    expect_success(run_mesh(c, 2, [&](const Context& context, const MoeLayerOptions& options) {
      MoeLayer layer(context, options);
      layer.initialise(3, "layers.0");
      const std::vector<Parameter> parts = layer.expert_parameters("");
      EXPECT_EQ(parts.size(), layer.local_inner().first == 0 ? 4U : 3U) << "the first slice adds the bias of down";
      for (std::size_t p = 0; p < parts.size(); ++p) {
        const std::vector<std::size_t> at = c.places(layer, parts[p].name);
        ASSERT_EQ(static_cast<std::int64_t>(at.size()), parts[p].value.elements());
        for (std::size_t i = 0; i < at.size(); ++i) ASSERT_EQ(parts[p].value.as<float>()[i], whole[p][at[i]]);
      }
    }));
  }
}

TEST(LayerSlices, take_their_part_of_what_is_written) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const LayerCase c({.experts = 5, .bias = true, .dtype = dtype});
    const std::int64_t H = c.spec.hidden, F = c.spec.inner, W = c.wide();
    expect_success(run_mesh(c, 2, [&](const Context& context, MoeLayerOptions options) {
      MoeLayer training(context, options);
      c.fill(training);
      options.inference = true;
      MoeLayer packed(context, options);
      std::memcpy(packed.dense_parameters("").front().value.data(), c.router.data(), c.router.size() * sizeof(float));
      const ExpertRange range = packed.local_experts();
      for (std::int64_t e = range.first; e < range.first + range.count; ++e) {
        packed.write_expert(
            e, {ConstTensor(c.up.data() + e * W * H, {W, H}), ConstTensor(c.down.data() + e * H * F, {H, F}),
                ConstTensor(c.up_bias.data() + e * W, {W}), ConstTensor(c.down_bias.data() + e * H, {H})});
      }
      const Array x = rows_of(c, c.x, c.held(context.rank(), context.size()));
      const Array a(dtype, x.view().shape()), b(dtype, x.view().shape());
      training.forward(context, x, a);
      packed.forward(context, x, b);
      EXPECT_EQ(std::memcmp(a.view().data(), b.view().data(), a.view().byte_size()), 0);
    }));
  }
}

TEST(LayerSlices, say_why_they_cannot_be) {
  const LayerCase c({.shared_inner = 5, .inner = 2});
  const auto error_with = [&](const auto& change) {
    return expect_same_error(run_mesh(c, 1,
                                      [&](const Context& context, MoeLayerOptions options) {
                                        change(options);
                                        MoeLayer layer(context, options);
                                      }))
        .message();
  };
  EXPECT_EQ(error_with([](MoeLayerOptions&) {}), "inner is 2, fewer than the 3 slices of tensor");
  EXPECT_EQ(error_with([](MoeLayerOptions& o) {
              o.inner = 19;
              o.shared_ranks = 1;
            }),
            "shared_ranks is 1: where experts lie in slices the shared ones are on every rank");
}

}  // namespace
}  // namespace expar::test
