// The elementary functions of the cpu backend, in units in the last place of f32.
#define EXPAR_CPU_ISA number_test
#include "backends/cpu/number.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "src/util/processor.h"

namespace expar {
namespace {

namespace isa = cpu::number_test;

/// The distance of `got` from `wanted` in units of the last place that an f32 of its size has.
double units(float got, double wanted) {
  if (std::abs(wanted) < 0x1p-126) return got == 0 || std::abs(got) < 0x1.00001p-126F ? 0 : HUGE_VAL;
  return std::abs(got - wanted) / std::ldexp(1.0, std::ilogb(wanted) - 23);
}

/// The worst of f over about a million f32 between the bits of `first` and `last`.
template <class Function, class Exact>
void expect_within(double limit, float first, float last, Function function, Exact exact) {
  const FloatMode mode;
  const auto begin = isa::as_word(first), end = isa::as_word(last);
  double worst = 0;
  float at = 0;
  for (isa::Word u = begin; u < end; u += (end - begin) / 1000003 + 1) {
    const float x = isa::as_float(u);
    const double off = units(function(x), exact(static_cast<double>(x)));
    if (off > worst) {
      worst = off;
      at = x;
    }
  }
  EXPECT_LE(worst, limit) << "at " << std::hexfloat << at << ": " << function(at);
}

float exp(float x) { return isa::exp(x); }
float log(float x) { return isa::log(x); }
float integral(float x) { return isa::normal(x).integral; }
float density(float x) { return isa::normal(x).density; }
double exact_integral(double x) { return std::erfc(-x / std::sqrt(2.0)) / 2; }
double exact_density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); }

TEST(Number, exp_is_within_two_units) {
  expect_within(2, 0x1p-40F, 88.7F, exp, [](double x) { return std::exp(x); });
  expect_within(2, -0x1p-40F, -87.3F, exp, [](double x) { return std::exp(x); });
}

TEST(Number, exp_goes_to_its_limits) {
  const FloatMode mode;
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(isa::exp(0.0F), 1.0F);
  EXPECT_EQ(isa::exp(88.8F), infinity);
  EXPECT_EQ(isa::exp(infinity), infinity);
  EXPECT_EQ(isa::exp(-87.5F), 0.0F);
  EXPECT_EQ(isa::exp(-infinity), 0.0F);
  EXPECT_TRUE(std::isnan(isa::exp(std::numeric_limits<float>::quiet_NaN())));
}

TEST(Number, log_is_within_two_units) {
  expect_within(2, 0x1p-126F, 0.99F, log, [](double x) { return std::log(x); });
  expect_within(2, 1.01F, 0x1.fffffep127F, log, [](double x) { return std::log(x); });
  EXPECT_EQ(isa::log(1.0F), 0.0F);
  EXPECT_EQ(isa::log(std::numeric_limits<float>::infinity()), std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(isa::log(std::numeric_limits<float>::quiet_NaN())));
}

TEST(Number, sigmoid_is_within_four_units) {
  const auto exact = [](double x) { return 1 / (1 + std::exp(-x)); };
  expect_within(
      4, 0x1p-40F, 200.0F, [](float x) { return isa::sigmoid(x); }, exact);
  expect_within(
      4, -0x1p-40F, -87.0F, [](float x) { return isa::sigmoid(x); }, exact);
}

TEST(Number, the_normal_distribution_is_exact_at_its_middle_and_good_in_its_tails) {
  expect_within(4, 0x1p-40F, 30.0F, integral, exact_integral);
  expect_within(4, -0x1p-40F, -1.0F, integral, exact_integral);
  expect_within(4, 0x1p-40F, 1.0F, density, exact_density);
  // x / sqrt(2) is rounded once, and again by the constant: 2 x^2 half units, which is 300 at the end.
  expect_within(300, -1.0F, -13.0F, integral, exact_integral);
  expect_within(300, 1.0F, 13.0F, density, exact_density);
  const FloatMode mode;
  EXPECT_EQ(isa::normal(0.0F).integral, 0.5F);
  EXPECT_EQ(isa::normal(std::numeric_limits<float>::infinity()).integral, 1.0F);
  EXPECT_EQ(isa::normal(-std::numeric_limits<float>::infinity()).integral, 0.0F);
}

}  // namespace
}  // namespace expar
