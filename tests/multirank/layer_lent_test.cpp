// A layer on its caller's parameters: the bytes of one that holds its own, every change seen, every mistake named.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <expar/mesh.h>

#include "tests/error_of.h"
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

bool same_bytes(const ConstTensor& a, const ConstTensor& b) {
  if (a.shape() != b.shape() || a.dtype() != b.dtype()) return false;
  return a.absent() || a.byte_size() == 0 || std::memcmp(a.data(), b.data(), a.byte_size()) == 0;
}

std::vector<Parameter> all_parameters(MoeLayer& layer) {
  std::vector<Parameter> all = layer.expert_parameters("");
  for (const Parameter& p : layer.dense_parameters("")) all.push_back(p);
  return all;
}

/// Memory for the parameters of a layer, as a framework holds it: bf16 matrices exist once.
struct Lender {
  explicit Lender(MoeLayer& layer, bool masters = false) : parameters(all_parameters(layer)) {
    for (Parameter& p : parameters) {
      const Shape shape = p.value.shape();
      const bool low = !p.low.absent();
      p.low = low ? room(DType::bf16, shape) : Tensor();
      p.value = low && !masters ? Tensor() : room(DType::f32, shape);
      p.gradient = room(DType::f32, shape);
    }
  }
  Tensor room(DType dtype, const Shape& shape) { return memory.emplace_back(dtype, shape).view(); }

  /// What `own` holds.
  void copy(MoeLayer& own) {
    const std::vector<Parameter> from = all_parameters(own);
    ASSERT_EQ(from.size(), parameters.size());
    for (std::size_t i = 0; i < from.size(); ++i) {
      for (const auto& [a, b] : {std::pair(from[i].value, parameters[i].value), {from[i].low, parameters[i].low}}) {
        if (b.byte_size() > 0 && !b.absent()) std::memcpy(b.data(), a.data(), b.byte_size());
      }
    }
  }

  std::vector<Array> memory;
  std::vector<Parameter> parameters;
};

/// One rank's tokens, and what a layer makes of them.
struct Pass {
  Pass(const LayerCase& c, const Context& context) : held(c.held(context.rank(), context.size())) {
    x = rows_of(c, c.x, held);
    residual = rows_of(c, c.residual, held);
    dout = rows_of(c, c.dout, held);
    for (std::size_t s = 0; s <= held.count; ++s) shards.push_back(c.shards[held.first + s] - c.shards[held.first]);
    for (Array* a : {&out, &inferred, &dx}) *a = Array(c.spec.dtype, x.view().shape());
  }
  void forward(MoeLayer& layer, const Context& context) {
    layer.forward(context, x, out, residual, shards, record);
    layer.forward(context, x, inferred, residual);
  }
  void run(MoeLayer& layer, const Context& context) {
    forward(layer, context);
    layer.backward(context, record, dout, dx);
  }

  LayerCase::Held held;
  Array x, residual, dout, out, inferred, dx;
  std::vector<std::int64_t> shards;
  MoeRecord record;
};

struct Gradients {
  explicit Gradients(MoeLayer& layer) {
    for (const Parameter& p : layer.expert_parameters("")) keep(p.gradient);
    for (const ConstTensor& gradient : layer.dense_shard_gradients()) keep(gradient);
  }
  void keep(const ConstTensor& gradient) {
    const auto* values = gradient.as<float>();
    all.emplace_back(values, values + gradient.elements());
  }
  std::vector<std::vector<float>> all;
};

bool same(const Gradients& a, const Gradients& b) {
  bool equal = a.all.size() == b.all.size();
  for (std::size_t i = 0; equal && i < a.all.size(); ++i) {
    equal = a.all[i].size() == b.all[i].size() &&
            (a.all[i].empty() || std::memcmp(a.all[i].data(), b.all[i].data(), a.all[i].size() * sizeof(float)) == 0);
  }
  return equal;
}

std::vector<LayerSpec> specs() {
  std::vector<LayerSpec> all;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    all.push_back({.dtype = dtype});
    all.push_back({.activation = Activation::relu2, .bias = true, .dtype = dtype, .recompute = true});
    all.push_back({.bias = true, .dtype = dtype, .shared_inner = 21, .shared_gate = true});
    all.push_back({.dtype = dtype, .shared_inner = 21, .special = {.zero = 1, .copy = 1, .constant = 2}});
  }
  return all;
}

class Lent : public testing::TestWithParam<LayerSpec> {};
INSTANTIATE_TEST_SUITE_P(Layer, Lent, testing::ValuesIn(specs()), [](const auto& test) { return test.param.name(); });

/// Both layers compute; everything that comes out is compared.
void expect_bytes_of_own(const LayerCase& c, const Context& context, MoeLayerOptions options) {
  MoeLayer own(context, options);
  c.fill(own);
  options.lent = true;
  MoeLayer layer(context, options);
  Lender lender(layer);
  lender.copy(own);
  layer.lend(lender.parameters);

  Pass wanted(c, context), got(c, context);
  wanted.run(own, context);
  got.run(layer, context);
  EXPECT_TRUE(same_bytes(wanted.out, got.out));
  EXPECT_TRUE(same_bytes(wanted.inferred, got.inferred));
  EXPECT_TRUE(same_bytes(wanted.dx, got.dx));
  EXPECT_TRUE(same(Gradients(own), Gradients(layer)));
  const std::vector<Parameter> experts = layer.expert_parameters("");
  for (std::size_t i = 0; i < experts.size(); ++i) {
    EXPECT_EQ(experts[i].gradient.data(), lender.parameters[i].gradient.data()) << "written where it was lent";
  }
  const auto slice_biases = static_cast<std::size_t>(2 * c.spec.experts * c.spec.hidden) * sizeof(float);
  EXPECT_LE(layer.parameter_bytes(), options.tensor ? slice_biases : 0);
}

TEST_P(Lent, gives_the_bytes_of_a_layer_that_holds_its_own) {
  const LayerCase c(GetParam());
  for (const int ranks : {1, 3}) {
    run(ranks, [&](const Context& context) { expect_bytes_of_own(c, context, c.options()); });
  }
}

TEST_P(Lent, goes_backward_twice_over_one_record_to_the_same_bytes) {
  const LayerCase c(GetParam());
  run(2, [&](const Context& context) {
    MoeLayer layer(context, c.options());
    c.fill(layer);
    Pass once(c, context);
    once.run(layer, context);
    const Gradients first(layer);
    Array again(c.spec.dtype, once.dx.view().shape());
    layer.backward(context, once.record, once.dout, again);
    EXPECT_TRUE(same_bytes(once.dx, again));
    EXPECT_TRUE(same(first, Gradients(layer)));
  });
}

TEST(LentLayer, gives_the_same_bytes_in_slices) {
  const LayerCase c({.bias = true, .shared_inner = 21});
  expect_success(run_communicators({.ranks = 6}, [&](const Communicator& communicator) {
    const Mesh mesh(communicator, {{"ep", 2}, {"tp", 3}});
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    MoeLayerOptions options = c.options();
    options.tensor = mesh.group("tp");
    expect_bytes_of_own(c, context.on(mesh.group("ep")), options);
  }));
}

TEST(LentLayer, infers_with_what_is_in_the_memory_now) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const LayerCase c({.dtype = dtype, .shared_inner = 21});
    run(2, [&](const Context& context) {
      MoeLayerOptions options = c.options();
      options.lent = true;
      MoeLayer layer(context, options);
      Lender lender(layer), elsewhere(layer);
      layer.lend(lender.parameters);
      layer.initialise(3, "a");
      Pass t(c, context);
      t.forward(layer, context);
      Array before(dtype, t.x.view().shape());
      const auto expect_change = [&](const char* what) {
        std::memcpy(before.view().data(), t.inferred.view().data(), before.view().byte_size());
        t.forward(layer, context);
        EXPECT_FALSE(same_bytes(before, t.inferred)) << what;
        EXPECT_TRUE(same_bytes(t.out, t.inferred)) << what;
      };
      for (const Parameter& p : lender.parameters) {
        const Tensor& read = p.low.absent() ? p.value : p.low;
        for (std::int64_t i = 0; i < read.elements(); ++i) {
          if (read.dtype() == DType::f32) read.as<float>()[i] *= -1.5F;
          if (read.dtype() == DType::bf16) read.as<bf16>()[i] = bf16(-1.5F * static_cast<float>(read.as<bf16>()[i]));
        }
        expect_change(p.name.c_str());
      }
      layer.lend(elsewhere.parameters);
      layer.initialise(4, "a");
      expect_change("other memory");
    });
  }
}

TEST(LentLayer, draws_the_numbers_of_a_layer_that_holds_its_own) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const LayerCase c({.bias = true, .dtype = dtype, .shared_inner = 21, .shared_gate = true, .special = {0, 0, 1}});
    for (const bool masters : {false, true}) {
      run(2, [&](const Context& context) {
        MoeLayerOptions options = c.options();
        MoeLayer own(context, options);
        own.initialise(3, "layers.0");
        options.lent = true;
        MoeLayer layer(context, options);
        Lender lender(layer, masters), wanted(layer, masters);
        wanted.copy(own);
        layer.lend(lender.parameters);
        layer.initialise(3, "layers.0");
        for (std::size_t i = 0; i < lender.parameters.size(); ++i) {
          const Parameter &a = lender.parameters[i], &b = wanted.parameters[i];
          EXPECT_TRUE(same_bytes(a.value, b.value) && same_bytes(a.low, b.low)) << a.name;
        }
      });
    }
  }
}

TEST(LentLayer, counts_losses_as_often_as_their_gradients_are_multiplied) {
  LayerCase c({});
  std::fill(c.dout.begin(), c.dout.end(), 0.0F);  // losses alone: all gradients are then linear in the coefficients
  run(2, [&](const Context& context) {
    MoeLayerOptions options = c.options();
    MoeLayer plain(context, options);
    options.router.balance *= 4;
    options.router.z *= 4;
    MoeLayer stronger(context, options);
    c.fill(plain);
    c.fill(stronger);
    Pass scaled(c, context), wanted(c, context);
    wanted.run(stronger, context);
    scaled.forward(plain, context);
    for (float& d : scaled.record.losses.dscores) d *= 4;
    scaled.record.losses.dlogsumexp *= 4;
    plain.backward(context, scaled.record, scaled.dout, scaled.dx);
    EXPECT_TRUE(same_bytes(scaled.dx, wanted.dx));
    EXPECT_TRUE(same(Gradients(plain), Gradients(stronger)));
    const ConstTensor gradient = plain.dense_shard_gradients().front();
    bool any = false;
    for (std::int64_t i = 0; i < gradient.elements(); ++i) any = any || gradient.as<float>()[i] != 0.0F;
    EXPECT_TRUE(any);
  });
}

TEST(LentLayer, names_what_is_wrong_with_parameters) {
  const LayerCase c({.experts = 2, .topk = 1, .dtype = DType::bf16, .hidden = 4, .inner = 3});
  run(1, [&](const Context& context) {
    MoeLayerOptions options = c.options();
    MoeLayer own(context, options);
    options.lent = true;
    MoeLayer layer(context, options);
    const Lender lender(layer);
    const auto refusal = [&](const auto& change) {
      std::vector<Parameter> parameters = lender.parameters;
      change(parameters);
      return refusal_of([&] { layer.lend(parameters); });
    };
    EXPECT_EQ(refusal([](auto& all) { all.pop_back(); }), "router.weight is not among the parameters that are lent");
    EXPECT_EQ(refusal([](auto& all) { all[0].name = "up"; }), "the layer has no parameter up to be lent");
    EXPECT_EQ(refusal([](auto& all) { all[0].low = {}; }), "experts.up: its low is f32 [], should be bf16 [2, 6, 4]");
    EXPECT_EQ(refusal([](auto& all) { all[1].low = all[0].low; }),
              "experts.down: its low is bf16 [2, 6, 4], should be bf16 [2, 4, 3]");
    EXPECT_EQ(refusal([](auto& all) { all[2].value = all[2].low; }),
              "router.weight: its value is f32 [], should be f32 [2, 4]");
    EXPECT_EQ(refusal([](auto& all) { all[0].gradient = all[2].value; }),
              "experts.up: its gradient is f32 [2, 4], should be f32 [2, 6, 4]");
    EXPECT_EQ(refusal([&](auto& all) { all = all_parameters(layer); }), "experts.up: its value is lent without memory");
    EXPECT_EQ(refusal_of([&] { own.lend(lender.parameters); }),
              "the layer holds its parameters itself (MoeLayerOptions::lent)");
  });
}

TEST(LentLayer, wants_its_parameters_before_it_computes) {
  const LayerCase c({});
  run(2, [&](const Context& context) {
    MoeLayerOptions options = c.options();
    options.lent = true;
    MoeLayer layer(context, options);
    Pass t(c, context);
    const std::string wanted = "the layer computes on parameters of its caller, and none were lent: call lend() first";
    EXPECT_EQ(refusal_of([&] { layer.initialise(1, ""); }), wanted);
    EXPECT_EQ(refusal_of([&] { layer.refresh(); }), wanted);
    EXPECT_EQ(refusal_of([&] { layer.forward(context, t.x, t.out); }), wanted);
    EXPECT_EQ(refusal_of([&] { t.run(layer, context); }), wanted);
    const Lender lender(layer);
    layer.lend(lender.parameters);
    layer.forward(context, t.x, t.out);  // the communicator is as good as before
    options.inference = true;
    EXPECT_EQ(refusal_of([&] { MoeLayer both(context, options); }),
              "lent parameters are read as they lie and never packed: the layer cannot be for inference alone");
  });
}

}  // namespace
}  // namespace expar::test
