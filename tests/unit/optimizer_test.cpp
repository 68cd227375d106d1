// AdamW: its formula, its moments, its low-precision copies, and what it refuses.
#include <gtest/gtest.h>

#include <cmath>

#include <expar/optimizer.h>
#include <expar/registry.h>

#include "tests/fastest_backend.h"

namespace expar {
namespace {

template <class Work>
void with_context(Work work) {
  run_threads(1, [&](const Communicator& communicator) {
    work(Context(communicator, {.threads = 1, .backend = test::fastest_backend()}));
  });
}

struct Trained {
  explicit Trained(std::int64_t count)
      : value(DType::f32, {count}), gradient(DType::f32, {count}), low(DType::bf16, {count}) {}
  Parameter parameter(const char* name, bool decay = true) const { return {name, value, gradient, low, decay}; }
  Array value, gradient, low;
};

TEST(AdamW, follows_its_formula) {
  with_context([](const Context& context) {
    const AdamWOptions options{.beta1 = 0.9F, .beta2 = 0.95F, .eps = 1e-8F, .decay = 0.1F};
    constexpr std::int64_t kCount = 37;
    const Trained a(kCount), b(3);
    double p[kCount], m[kCount] = {}, v[kCount] = {};
    for (int i = 0; i < kCount; ++i) {
      p[i] = 0.1 * i - 1;
      a.value.as<float>()[i] = static_cast<float>(p[i]);
    }
    AdamW optimizer(options);
    for (int step = 1; step <= 5; ++step) {
      const float lr = 0.01F / static_cast<float>(step);
      for (int i = 0; i < kCount; ++i) {
        const double g = std::sin(i + 3.0 * step);
        a.gradient.as<float>()[i] = static_cast<float>(g);
        m[i] = 0.9 * m[i] + 0.1 * g;
        v[i] = 0.95 * v[i] + 0.05 * g * g;
        const double unbiased = m[i] / (1 - std::pow(0.9, step));
        p[i] -= lr * (unbiased / (std::sqrt(v[i] / (1 - std::pow(0.95, step))) + 1e-8) + 0.1 * p[i]);
      }
      const Parameter parameters[] = {a.parameter("a"), b.parameter("b", false)};
      optimizer.step(context, parameters, lr);
    }
    for (int i = 0; i < kCount; ++i) {
      EXPECT_NEAR(a.value.as<float>()[i], p[i], 2e-6) << i;
      EXPECT_EQ(a.low.as<bf16>()[i].bits, bf16(a.value.as<float>()[i]).bits) << i;
    }
    for (int i = 0; i < 3; ++i) EXPECT_EQ(b.value.as<float>()[i], 0.0F);
  });
}

TEST(AdamW, decays_only_what_it_is_told_to) {
  with_context([](const Context& context) {
    const Trained a(4), b(4);
    for (int i = 0; i < 4; ++i) a.value.as<float>()[i] = b.value.as<float>()[i] = 1.0F;
    AdamW optimizer({.decay = 0.5F});
    const Parameter parameters[] = {a.parameter("a", true), b.parameter("b", false)};
    optimizer.step(context, parameters, 0.5F);
    EXPECT_EQ(a.value.as<float>()[0], 0.75F);
    EXPECT_EQ(b.value.as<float>()[0], 1.0F);
  });
}

TEST(AdamW, refuses_parameters_that_changed) {
  with_context([](const Context& context) {
    const auto message = [&](AdamW& optimizer, std::vector<Parameter> parameters, float lr) -> std::string {
      try {
        optimizer.step(context, parameters, lr);
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::bad_argument);
        return error.message();
      }
      return "";
    };
    const Trained a(4), b(5);
    AdamW optimizer;
    EXPECT_EQ(message(optimizer, {a.parameter("a")}, 0.1F), "");
    EXPECT_EQ(message(optimizer, {a.parameter("a"), b.parameter("b")}, 0.1F),
              "the step before had 1 parameters, this one has 2");
    EXPECT_EQ(message(optimizer, {b.parameter("b")}, 0.1F), "b has 5 elements, in its place were 4 in the step before");
    Parameter wrong = a.parameter("a");
    wrong.gradient = b.gradient;
    EXPECT_EQ(message(optimizer, {wrong}, 0.1F), "a: gradient is f32 [5], should be f32 [4]");
    EXPECT_EQ(message(optimizer, {a.parameter("a")}, NAN), "the learning rate is nan");
    EXPECT_EQ(message(optimizer, {a.parameter("a")}, 0.1F), "");
  });
}

}  // namespace
}  // namespace expar
