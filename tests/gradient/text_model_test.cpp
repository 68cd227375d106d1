// The text model's gradients, against differences of its own loss, for every kind of parameter.
#include "models/text_model.h"

#include <cmath>
#include <string>
#include <vector>

#include <expar/collectives.h>
#include <expar/random.h>
#include <expar/registry.h>
#include <gtest/gtest.h>

namespace expar {
namespace {

constexpr std::int64_t kTokens = 24, kShards = 3;

TextModelOptions small(DType dtype) {
  TextModelOptions options;
  options.context = 3;
  options.layers = 2;
  options.moe.hidden = 16;
  options.moe.inner = 8;
  options.moe.router = {.experts = 4, .topk = 2};
  options.moe.dtype = dtype;
  return options;
}

Batch make_batch(std::int64_t context) {
  const Random random(3, "bytes");
  Batch batch;
  for (std::uint64_t t = 0; t < kTokens; ++t) {
    batch.targets.push_back(static_cast<std::uint8_t>(random.bits(t)));
    for (std::int64_t c = 0; c < context; ++c) {  // few bytes, so that rows of the table meet several tokens
      const auto place = 1000 + t * static_cast<std::uint64_t>(context) + static_cast<std::uint64_t>(c);
      batch.contexts.push_back(static_cast<std::uint8_t>(random.bits(place) % 5));
    }
  }
  return batch;
}

// Fills all values, also of the head (which begins at zero) and the norms' gains (at one).
void fill(const std::vector<Parameter>& parameters) {
  for (const Parameter& parameter : parameters) {
    const Random random(5, parameter.name);
    for (std::int64_t i = 0; i < parameter.value.elements(); ++i) {
      parameter.value.as<float>()[i] += 0.3F * random.normal(static_cast<std::uint64_t>(i));
    }
  }
}

void move(const Parameter& parameter, std::span<const float> start, const Random& direction, float distance) {
  for (std::size_t i = 0; i < start.size(); ++i) {
    parameter.value.as<float>()[i] = start[i] + distance * direction.normal(i);
  }
}

void expect_gradients_match(const Context& context, TextModelOptions options) {
  TextModel model(context, options, 1);
  const auto parameters = model.parameters();
  const Batch batch = make_batch(options.context);
  const Sharding sharding = shard_batch(kTokens, kShards, context.rank(), context.size());
  fill(parameters);
  const auto loss = [&] {
    model.refresh(context);
    return static_cast<double>(model.train(context, batch, sharding));
  };
  for (const Parameter& parameter : parameters) {
    const std::size_t count = static_cast<std::size_t>(parameter.value.elements());
    const std::vector<float> start(parameter.value.as<float>(), parameter.value.as<float>() + count);
    loss();
    const std::vector<float> gradient(parameter.gradient.as<float>(), parameter.gradient.as<float>() + count);
    double norm = 0;
    for (const float g : gradient) norm += static_cast<double>(g) * static_cast<double>(g);
    EXPECT_GT(norm, 1e-8) << parameter.name << " has no gradient";
    for (int trial = 0; trial < 3; ++trial) {
      const Random direction(static_cast<std::uint64_t>(trial), parameter.name);
      double exact = 0;
      for (std::size_t i = 0; i < count; ++i) {
        exact += static_cast<double>(gradient[i]) * static_cast<double>(direction.normal(i));
      }
      // Small enough for the curvature, large enough for a loss of 24 bits.
      const float distance = 4e-3F / std::sqrt(static_cast<float>(count) / 16);
      move(parameter, start, direction, distance);
      const double above = loss();
      move(parameter, start, direction, -distance);
      const double below = loss();
      move(parameter, start, direction, 0);
      const double measured = (above - below) / (2 * static_cast<double>(distance));
      const double noise = 2e-6 / static_cast<double>(distance);
      EXPECT_NEAR(measured, exact, 0.02 * std::sqrt(norm) + noise) << parameter.name << ", direction " << trial;
    }
  }
}

class TextModelOn : public testing::TestWithParam<std::string> {
 protected:
  ContextOptions one_thread() const { return {.threads = 1, .backend = GetParam()}; }
};

INSTANTIATE_TEST_SUITE_P(, TextModelOn, testing::ValuesIn(available_backends()),
                         [](const auto& test) { return test.param; });

TEST_P(TextModelOn, differentiates_every_parameter) {
  run_threads(1, [&](const Communicator& communicator) {
    expect_gradients_match(Context(communicator, one_thread()), small(DType::f32));
  });
}

TEST_P(TextModelOn, differentiates_shared_experts) {
  run_threads(1, [&](const Communicator& communicator) {
    TextModelOptions options = small(DType::f32);
    options.moe.shared_inner = 6;
    options.moe.shared_gate = true;
    expect_gradients_match(Context(communicator, one_thread()), options);
  });
}

TEST_P(TextModelOn, leaves_the_dense_twin_nothing_to_choose) {
  run_threads(1, [&](const Communicator& communicator) {
    TextModelOptions twin = dense_twin(small(DType::f32));
    EXPECT_EQ(twin.moe.inner, 16);
    const Context context(communicator, one_thread());
    TextModel model(context, twin, 1);
    fill(model.parameters());
    model.refresh(context);
    const Batch batch = make_batch(twin.context);
    model.train(context, batch, shard_batch(kTokens, kShards, 0, 1));
    for (const Parameter& parameter : model.parameters()) {
      if (parameter.name.find("router") == std::string::npos) continue;
      for (std::int64_t i = 0; i < parameter.gradient.elements(); ++i) {
        EXPECT_EQ(parameter.gradient.as<float>()[i], 0.0F);
      }
    }
  });
}

TEST_P(TextModelOn, evaluates_as_it_trains) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    run_threads(2, [&](const Communicator& communicator) {
      const Context context(communicator, one_thread());
      const TextModelOptions options = small(dtype);
      TextModel model(context, options, 1);
      const Batch batch = make_batch(options.context);
      const Sharding sharding = shard_batch(kTokens, kShards, context.rank(), context.size());
      EXPECT_FLOAT_EQ(model.train(context, batch, sharding), std::log(256.0F)) << "a head of zeros knows nothing";

      fill(model.parameters());
      model.refresh(context);
      const float loss = model.train(context, batch, sharding);
      std::vector<double> nats(static_cast<std::size_t>(sharding.local_shards()));
      model.refresh(context);
      model.evaluate(context, batch, sharding, nats);
      Array rows(DType::f32, {sharding.local_shards(), 1}), sum(DType::f32, {1});
      for (std::size_t s = 0; s < nats.size(); ++s) rows.as<float>()[s] = static_cast<float>(nats[s] / kTokens);
      all_reduce(context, rows, sum);
      EXPECT_NEAR(sum.as<float>()[0], loss, 1e-5F);
    });
  }
}

TEST(TextModel, says_which_option_is_wrong) {
  const auto message = [](auto&& change) {
    TextModelOptions options = small(DType::f32);
    change(options);
    try {
      validate(options);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::bad_argument);
      return error.message();
    }
    return std::string();
  };
  EXPECT_EQ(message([](auto&) {}), "");
  EXPECT_EQ(message([](auto& o) { o.layers = 0; }), "layers 0 is not at least 1");
  EXPECT_EQ(message([](auto& o) { o.moe.hidden = -1; }), "hidden -1 is not at least 1");
  EXPECT_EQ(message([](auto& o) { o.moe.dtype = DType::f16; }), "dtype f16 is neither f32 nor bf16");
  EXPECT_NE(message([](auto& o) { o.moe.router.topk = 5; }), "");
}

}  // namespace
}  // namespace expar
