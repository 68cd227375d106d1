// Zero, copy and constant experts: against a loop in double, and their gradients against finite differences.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include <expar/random.h>
#include <expar/registry.h>
#include <expar/special.h>

#include "tests/contract/ways.h"
#include "tests/fastest_backend.h"
#include "tests/gradient/differences.h"

namespace expar::test {
namespace {

constexpr std::int64_t kTokens = 37, kTopk = 3, kHidden = 21, kFirst = 4;
constexpr SpecialExperts kExperts{.zero = 1, .copy = 2, .constant = 3};
constexpr std::int64_t kShards[] = {0, 5, 5, 21, 37};
constexpr std::int64_t kCount = std::size(kShards) - 1;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

/// Every id is chosen by some slot: usual experts, special ones and none.
struct Case {
  Case() {
    fill(x, "x"), fill(weights, "weights"), fill(mix, "mix"), fill(value, "value"), fill(dout, "dout");
    for (std::int64_t i = 0; i < ids.view().elements(); ++i)
      ids.as<std::int32_t>()[i] = static_cast<int>(i * 7 % 11 - 1);
    pass = {kExperts, kFirst, x, ids, weights, mix, value};
  }
  static void fill(const Array& array, const char* name) {
    const Random random(3, name);
    for (std::int64_t i = 0; i < array.view().elements(); ++i) {
      array.as<float>()[i] = 0.5F * random.normal(static_cast<std::uint64_t>(i));
    }
  }
  std::int32_t id(std::int64_t t, std::int64_t k) const { return ids.as<std::int32_t>()[t * kTopk + k]; }

  Array x{DType::f32, {kTokens, kHidden}}, ids{DType::int32, {kTokens, kTopk}}, weights{DType::f32, {kTokens, kTopk}};
  Array mix{DType::f32, {3, 2, kHidden}}, value{DType::f32, {3, kHidden}}, dout{DType::f32, {kTokens, kHidden}};
  SpecialPass pass;
};

/// What add_special adds, as one loop.
std::vector<double> sums_of(const Case& c) {
  const auto number = [](const Array& array, std::int64_t i) { return double{array.as<float>()[i]}; };
  std::vector<double> out(at(kTokens * kHidden));
  for (std::int64_t t = 0; t < kTokens; ++t) {
    for (std::int64_t k = 0; k < kTopk; ++k) {
      const std::int64_t id = c.id(t, k), constant = id - 7;
      double of_x = id == 5 || id == 6 ? 1 : 0, of_value = 0;
      if (constant >= 0) {
        double z[2] = {};
        for (int part = 0; part < 2; ++part) {
          for (std::int64_t h = 0; h < kHidden; ++h) {
            z[part] += number(c.x, t * kHidden + h) * number(c.mix, (2 * constant + part) * kHidden + h);
          }
        }
        of_x = std::exp(z[0]) / (std::exp(z[0]) + std::exp(z[1]));
        of_value = std::exp(z[1]) / (std::exp(z[0]) + std::exp(z[1]));
      }
      for (std::int64_t h = 0; h < kHidden; ++h) {
        const double v = constant < 0 ? 0 : number(c.value, constant * kHidden + h);
        out[at(t * kHidden + h)] +=
            number(c.weights, t * kTopk + k) * (of_x * number(c.x, t * kHidden + h) + of_value * v);
      }
    }
  }
  return out;
}

void with_context(int threads, const std::function<void(const Context&)>& test) {
  run_threads(1, [&](const Communicator& communicator) {
    test(Context(communicator, {.threads = threads, .backend = fastest_backend()}));
  });
}

TEST(SpecialExperts, add_what_a_plain_loop_says) {
  with_context(2, [](const Context& context) {
    const Case c;
    const Array out(DType::f32, {kTokens, kHidden});
    for (std::int64_t i = 0; i < out.view().elements(); ++i) out.as<float>()[i] = static_cast<float>(i % 5);
    add_special(context, c.pass, out);
    const std::vector<double> sums = sums_of(c);
    for (std::int64_t i = 0; i < out.view().elements(); ++i) {
      // Three sums of f32 below 8.
      ASSERT_NEAR(out.as<float>()[i], static_cast<double>(i % 5) + sums[at(i)], 3 * 8 * 0x1p-24) << i;
    }
  });
}

struct Gradients {
  Array dx{DType::f32, {kTokens, kHidden}}, dweights{DType::f32, {kTokens, kTopk}};
  Array mix{DType::f32, {kCount, 3, 2, kHidden}}, value{DType::f32, {kCount, 3, kHidden}};
};

void go_back(const Context& context, const Case& c, const Gradients& to) {
  special_backward(context, c.pass, kShards, c.dout, to.dx, to.dweights, {to.mix, to.value});
}

TEST(SpecialExperts, have_the_gradients_of_finite_differences) {
  with_context(2, [](const Context& context) {
    const Case c;
    const Gradients gradients;
    go_back(context, c, gradients);
    const auto loss_of = [&](std::int64_t begin, std::int64_t end) {
      const std::vector<double> out = sums_of(c);
      double sum = 0;
      for (std::int64_t i = begin * kHidden; i < end * kHidden; ++i) sum += out[at(i)] * double{c.dout.as<float>()[i]};
      return sum;
    };
    const auto compare = [&](const char* name, const Array& of, const float* gradient, std::int64_t begin,
                             std::int64_t end) {
      std::vector<double> differences;
      for (std::int64_t i = 0; i < of.view().elements(); ++i) {
        differences.push_back(derivative(of.as<float>()[i], 0.01, [&] { return loss_of(begin, end); }));
      }
      expect_gradient(name, differences, gradient, 1e-5);
    };
    compare("dx", c.x, gradients.dx.as<float>(), 0, kTokens);
    compare("dweights", c.weights, gradients.dweights.as<float>(), 0, kTokens);
    for (std::int64_t s = 0; s < kCount; ++s) {
      const float* const mix = gradients.mix.as<float>() + s * c.mix.view().elements();
      const float* const value = gradients.value.as<float>() + s * c.value.view().elements();
      if (kShards[s] == kShards[s + 1]) {
        for (std::int64_t i = 0; i < c.mix.view().elements(); ++i) EXPECT_EQ(mix[i], 0.0F);
        continue;
      }
      compare("mix", c.mix, mix, kShards[s], kShards[s + 1]);
      compare("value", c.value, value, kShards[s], kShards[s + 1]);
    }
  });
}

TEST(SpecialExperts, leave_the_slots_of_others_alone) {
  with_context(1, [](const Context& context) {
    const Case c;
    const Gradients gradients;
    for (std::int64_t i = 0; i < kTokens * kTopk; ++i) gradients.dweights.as<float>()[i] = 99.0F;
    go_back(context, c, gradients);
    for (std::int64_t i = 0; i < kTokens * kTopk; ++i) {
      const std::int32_t id = c.ids.as<std::int32_t>()[i];
      EXPECT_EQ(gradients.dweights.as<float>()[i] == 99.0F, id < kFirst) << id;
      if (id == kFirst) {
        EXPECT_EQ(gradients.dweights.as<float>()[i], 0.0F) << "a zero expert";
      }
    }
  });
}

TEST(SpecialExperts, say_what_does_not_fit) {
  with_context(1, [](const Context& context) {
    Case c;
    const Array out(DType::f32, {kTokens, kHidden});
    const auto refusal = [&](const SpecialPass& pass) {
      return error_of([&] { add_special(context, pass, out); }).message();
    };
    SpecialPass wrong = c.pass;
    wrong.experts.copy = -1;
    EXPECT_EQ(refusal(wrong), "-1 copy experts are below 0");
    wrong = c.pass;
    wrong.mix = c.value;
    EXPECT_EQ(refusal(wrong), "mix is f32 [3, 21], should be f32 [3, 2, 21]");
    c.ids.as<std::int32_t>()[4] = 10;
    EXPECT_EQ(refusal(c.pass), "ids[1,1] = 10 is no expert below 10 and not -1");
  });
}

}  // namespace
}  // namespace expar::test
