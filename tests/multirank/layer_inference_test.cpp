// Inference with the layer: bounded plans give the bytes of exact ones, packed weights those of plain ones.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "tests/contract/ways.h"
#include "tests/fastest_backend.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

class Inference : public testing::TestWithParam<RankSetup> {};
INSTANTIATE_TEST_SUITE_P(Layer, Inference, testing::ValuesIn(all_setups()),
                         [](const auto& test) { return test.param.name(); });

/// This rank's tokens of `c`.
struct Tokens {
  Tokens(const LayerCase& c, const Context& context)
      : x(rows_of(c, c.x, c.held(context.rank(), context.size()))), out(x.view().dtype(), x.view().shape()) {}
  Array x, out;
};

void expect_same(const Array& a, const Array& b) {
  const std::size_t bytes = a.view().byte_size();
  EXPECT_TRUE(bytes == 0 || std::memcmp(a.view().data(), b.view().data(), bytes) == 0);
}

/// Writes this rank's part of `c` into a layer for inference alone.
void write(const LayerCase& c, MoeLayer& layer) {
  const std::int64_t H = c.spec.hidden, F = c.spec.inner, W = c.wide();
  const ExpertRange range = layer.local_experts();
  for (std::int64_t e = range.first; e < range.first + range.count; ++e) {
    ExpertSource one{ConstTensor(c.up.data() + e * W * H, {W, H}), ConstTensor(c.down.data() + e * H * F, {H, F})};
    if (c.spec.bias) {
      one.up_bias = ConstTensor(c.up_bias.data() + e * W, {W});
      one.down_bias = ConstTensor(c.down_bias.data() + e * H, {H});
    }
    layer.write_expert(e, one);
  }
  for (const Parameter& p : layer.dense_parameters("")) {
    EXPECT_TRUE(p.gradient.absent());
    std::memcpy(p.value.data(), c.dense(p.name).data(), p.value.byte_size());
  }
  if (c.spec.shared_inner == 0) return;
  const std::int64_t S = c.spec.shared_inner;
  layer.write_shared(ConstTensor(c.shared_up.data(), {W / F * S, H}), ConstTensor(c.shared_down.data(), {H, S}),
                     c.spec.shared_gate ? ConstTensor(c.shared_gate.data(), {H}) : ConstTensor());
}

std::vector<LayerSpec> specs() {
  std::vector<LayerSpec> all;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    all.push_back({.dtype = dtype});
    all.push_back({.bias = true, .dtype = dtype, .shared_inner = 21, .shared_gate = true});
    all.push_back({.experts = 5, .topk = 3, .dtype = dtype, .special = {.zero = 1, .copy = 1, .constant = 1}});
  }
  return all;
}

TEST_P(Inference, gives_the_same_bytes_with_bounded_and_exact_plans) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const LayerCase c({.dtype = dtype});
    expect_success(run_communicators(GetParam(), [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
      const Tokens exact(c, context), bounded(c, context);
      MoeLayerOptions options = c.options();
      for (const Tokens* tokens : {&exact, &bounded}) {
        MoeLayer layer(context, options);
        c.fill(layer);
        layer.forward(context, tokens->x, tokens->out);
        options.bound = c.tokens();
      }
      expect_same(exact.out, bounded.out);
    }));
  }
}

TEST_P(Inference, gives_a_training_layers_bytes_from_packed_weights_alone) {
  for (const LayerSpec& spec : specs()) {
    const LayerCase c(spec);
    expect_success(run_communicators(GetParam(), [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
      const Tokens usual(c, context), packed(c, context);
      MoeLayer training(context, c.options());
      c.fill(training);
      training.forward(context, usual.x, usual.out);
      MoeLayerOptions options = c.options();
      options.inference = true;
      MoeLayer layer(context, options);
      write(c, layer);
      layer.refresh();
      layer.forward(context, packed.x, packed.out);
      expect_same(usual.out, packed.out);
      EXPECT_EQ(layer.inference_record().plan.tokens(), packed.x.view().size(0));

      training.initialise(5, "drawn");
      layer.initialise(5, "drawn");
      training.forward(context, usual.x, usual.out);
      layer.forward(context, packed.x, packed.out);
      expect_same(usual.out, packed.out);
    }));
  }
}

/// Inference on `x` where the first `shared_ranks` ranks hold the shared experts.
Array with_shared_ranks(const LayerCase& c, const Context& context, int shared_ranks, const Tokens& tokens,
                        const MoeInputs& inputs) {
  MoeLayerOptions options = c.options();
  options.inference = true;
  options.shared_ranks = shared_ranks;
  MoeLayer layer(context, options);
  EXPECT_EQ(layer.holds_shared(), context.rank() < shared_ranks);
  if (layer.holds_shared()) {
    EXPECT_EQ(layer.local_experts().count, 0);
  }
  write(c, layer);
  Array out(tokens.x.view().dtype(), tokens.x.view().shape());
  layer.forward(context, tokens.x, out, {}, inputs);
  return out;
}

TEST_P(Inference, may_have_shared_experts_on_ranks_of_their_own) {
  if (GetParam().ranks == 1) return;  // which has no rank left for the other experts
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const WeightsOn weights_on : {WeightsOn::output, WeightsOn::inner}) {
      LayerSpec spec{.weights_on = weights_on, .dtype = dtype, .shared_inner = 21, .shared_gate = true};
      if (weights_on == WeightsOn::inner) spec.special = {.zero = 1, .copy = 1, .constant = 1};
      const LayerCase c(spec);
      expect_success(run_communicators(GetParam(), [&](const Communicator& communicator) {
        const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
        const Tokens tokens(c, context);
        Array mask(DType::int8, {tokens.x.view().size(0)});
        for (std::int64_t t = 0; t < mask.view().size(0); ++t) mask.as<std::int8_t>()[t] = t % 5 != 2;
        const MoeInputs inputs{.mask = mask};
        MoeLayer usual(context, c.options());
        c.fill(usual);
        usual.forward(context, tokens.x, tokens.out, {}, inputs);
        const Array one = with_shared_ranks(c, context, 1, tokens, inputs);
        expect_same(one, with_shared_ranks(c, context, context.size() - 1, tokens, inputs));
        if (dtype == DType::f32 && weights_on == WeightsOn::output) return expect_same(one, tokens.out);
        for (std::int64_t i = 0; i < one.view().elements(); ++i) {
          const auto at = [&](const Array& a) {
            return dtype == DType::f32 ? a.as<float>()[i] : static_cast<float>(a.as<bf16>()[i]);
          };
          EXPECT_NEAR(at(one), at(tokens.out), dtype == DType::f32 ? 1e-5 : 0.05) << i;
        }
      }));
    }
  }
}

TEST_P(Inference, needs_ranks_for_both_kinds_of_experts) {
  const LayerCase c({.shared_inner = 21});
  const auto message = [&](int shared_ranks, bool inference) {
    const auto ends = run_communicators(GetParam(), [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
      MoeLayerOptions options = c.options();
      options.inference = inference;
      options.shared_ranks = shared_ranks;
      MoeLayer layer(context, options);
    });
    return expect_same_error(ends).message();
  };
  const std::string ranks = std::to_string(GetParam().ranks);
  EXPECT_EQ(message(GetParam().ranks, true),
            "shared_ranks is " + ranks + ", which leaves none of " + ranks + " ranks for the other experts");
  EXPECT_EQ(message(-1, true), "shared_ranks is -1, below 0");
  if (GetParam().ranks == 1) return;
  EXPECT_EQ(message(1, false),
            "shared_ranks is 1: shared experts on ranks of their own are for MoeLayerOptions::inference");
}

TEST_P(Inference, makes_the_norm_of_what_comes_out_in_one_pass) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const LayerCase c({.dtype = dtype, .shared_inner = 21});
    expect_success(run_communicators(GetParam(), [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
      const Tokens plain(c, context), normed(c, context);
      const Array residual = rows_of(c, c.residual, c.held(context.rank(), context.size()));
      const std::int64_t tokens = plain.x.view().size(0);
      Array gain(DType::f32, {c.spec.hidden});
      for (std::int64_t h = 0; h < c.spec.hidden; ++h) gain.as<float>()[h] = 1 + static_cast<float>(h) / 8;
      const Array wanted(dtype, {tokens, c.spec.hidden}), got(dtype, {tokens, c.spec.hidden});
      const Array wanted_scale(DType::f32, {tokens}), got_scale(DType::f32, {tokens});
      MoeLayer layer(context, c.options());
      c.fill(layer);
      layer.forward(context, plain.x, plain.out, residual);
      rms_norm(context, plain.out, {gain, 1e-5F, wanted, wanted_scale});
      layer.forward(context, normed.x, normed.out, residual, {.norm = {gain, 1e-5F, got, got_scale}});
      expect_same(plain.out, normed.out);
      expect_same(wanted, got);
      expect_same(wanted_scale, got_scale);
    }));
  }
}

TEST_P(Inference, tells_every_rank_of_a_norm_of_the_wrong_shape) {
  const LayerCase c({});
  const auto ends = run_communicators(GetParam(), [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    const Tokens tokens(c, context);
    const Array gain(DType::f32, {c.spec.hidden + context.rank()});
    MoeLayer layer(context, c.options());
    c.fill(layer);
    layer.forward(context, tokens.x, tokens.out, {}, {.norm = {gain, -1.0F, tokens.out}});
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.code(), ErrorCode::bad_argument);
  EXPECT_NE(std::string(error.what()).find("the norm's epsilon is -1"), std::string::npos) << error.what();
}

TEST_P(Inference, rejects_training_and_says_how_to_write_weights) {
  const LayerCase c({.shared_inner = 21});
  expect_success(run_communicators(GetParam(), [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    const Tokens tokens(c, context), other(c, context);
    MoeLayerOptions options = c.options();
    options.inference = true;
    MoeLayer layer(context, options);
    write(c, layer);
    EXPECT_TRUE(layer.dense_parameters("").front().gradient.absent());
    EXPECT_EQ(error_of([&] { layer.expert_parameters(""); }).message(),
              "the layer is for inference alone and holds packed weights: write them by write_expert()");
    EXPECT_EQ(layer.dense_parameters("").size(), 1U) << "the router's weight; the shared experts are packed";

    MoeRecord record;
    const std::vector<std::int64_t> shards{0, tokens.x.view().size(0)};
    const std::string refusal = "the layer is for inference alone (MoeLayerOptions::inference)";
    EXPECT_EQ(error_of([&] { layer.forward(context, tokens.x, tokens.out, {}, shards, record); }).message(), refusal);
    EXPECT_EQ(error_of([&] { layer.backward(context, record, tokens.x, tokens.out); }).message(), refusal);
    layer.forward(context, tokens.x, tokens.out);  // the communicator is as good as before
  }));
}

TEST(InferenceAlone, rejects_weights_that_do_not_fit_and_kernels_that_cannot_read_them) {
  expect_success(run_communicators(RankSetup{}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    const LayerCase c({.experts = 2, .topk = 1, .bias = true, .hidden = 4, .inner = 3});
    MoeLayerOptions options = c.options();
    options.inference = true;
    MoeLayer layer(context, options);
    const Array up(DType::f32, {6, 4}), down(DType::f32, {4, 3}), wrong(DType::int32, {4, 3});
    const Array up_bias(DType::f32, {6}), down_bias(DType::f32, {4});
    const auto refusal = [&](std::int64_t expert, const ExpertSource& from) {
      return error_of([&] { layer.write_expert(expert, from); }).message();
    };
    EXPECT_EQ(refusal(2, {up, down}), "expert 2 is none of the 2 from 0 on that this rank holds");
    EXPECT_EQ(refusal(0, {down, down}), "up to write is f32 [4, 3], should be f32 or bf16 [6, 4]");
    EXPECT_EQ(refusal(0, {up, wrong}), "down to write is int32 [4, 3], should be f32 or bf16 [4, 3]");
    EXPECT_EQ(refusal(0, {up, down}), "up_bias to write is f32 [], should be f32 or bf16 [6]");
    EXPECT_EQ(refusal(0, {up, down, up_bias, up}), "down_bias to write is f32 [6, 4], should be f32 or bf16 [4]");
    EXPECT_EQ(error_of([&] { layer.write_shared(up, down); }).message(), "this layer has no shared experts");

    const Tokens tokens(c, context);
    const Context other(communicator, {.threads = 1, .backend = "reference"});
    if (other.kernels().pack == context.kernels().pack) return;
    EXPECT_NE(error_of([&] { layer.forward(other, tokens.x, tokens.out); }).message().find("not of reference"),
              std::string::npos);
  }));
}

TEST(InferenceAlone, takes_weights_of_either_dtype_one_expert_at_a_time) {
  expect_success(run_communicators(RankSetup{}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const LayerCase c({.dtype = dtype});
      const Tokens wide(c, context), low(c, context);
      MoeLayerOptions options = c.options();
      options.inference = true;
      MoeLayer layer(context, options);
      write(c, layer);
      // Numbers that bf16 holds, so that where they pass through makes no difference.
      const auto of = [&](DType in, const std::vector<float>& all, std::int64_t e, const Shape& shape) {
        Array values(in, shape);
        for (std::int64_t i = 0; i < shape.elements(); ++i) {
          const bf16 value(all[static_cast<std::size_t>(e * shape.elements() + i)]);
          if (in == DType::f32) values.as<float>()[i] = static_cast<float>(value);
          if (in == DType::bf16) values.as<bf16>()[i] = value;
        }
        return values;
      };
      for (const auto& [in, tokens] : {std::pair(DType::f32, &wide), std::pair(DType::bf16, &low)}) {
        for (std::int64_t e = 0; e < c.spec.experts; ++e) {
          const Array up = of(in, c.up, e, {c.wide(), c.spec.hidden});
          const Array down = of(in, c.down, e, {c.spec.hidden, c.spec.inner});
          layer.write_expert(e, {up, down});
        }
        layer.forward(context, tokens->x, tokens->out);
      }
      expect_same(wide.out, low.out);
    }
  }));
}

TEST(InferenceAlone, holds_each_weight_once) {
  expect_success(run_communicators(RankSetup{}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    const LayerCase c({.experts = 4, .dtype = DType::bf16, .shared_inner = 64, .hidden = 128, .inner = 64});
    const Tokens tokens(c, context);
    const std::int64_t router = c.spec.experts * c.spec.hidden * 4;
    const std::int64_t weights = (c.spec.experts + 1) * 3 * c.spec.hidden * c.spec.inner;
    MoeLayerOptions options = c.options();

    MoeLayer training(context, options);
    c.fill(training);
    training.forward(context, tokens.x, tokens.out);
    const auto held = static_cast<std::int64_t>(training.parameter_bytes());
    EXPECT_GE(held, weights * (4 + 4 + 2 + 2)) << "masters, gradients, bf16 copies and packed ones";

    options.inference = true;
    MoeLayer layer(context, options);
    const std::size_t empty = layer.parameter_bytes();
    write(c, layer);
    layer.forward(context, tokens.x, tokens.out);
    EXPECT_EQ(layer.parameter_bytes(), empty);
    EXPECT_EQ(static_cast<std::int64_t>(empty), weights * 2 + router);  // of sizes that need no padding
  }));
}

}  // namespace
}  // namespace expar::test
