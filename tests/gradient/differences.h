// Finite differences: what a gradient is compared with.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

namespace expar::test {

/// The points at which a function is looked at around an element, in steps, and the weights that make a derivative of
/// them: the error falls with the fourth power of the step, so that steps stay wide above the rounding of f32.
struct Stencil {
  static constexpr int kPoints = 4;
  static constexpr double kAt[kPoints] = {-2, -1, 1, 2};
  static constexpr double kWeight[kPoints] = {1.0 / 12, -8.0 / 12, 8.0 / 12, -1.0 / 12};
};

/// d f / d `element`, where f() reads it.
template <class F>
double derivative(float& element, double step, F f) {
  const float before = element;
  double sum = 0;
  for (int p = 0; p < Stencil::kPoints; ++p) {
    element = static_cast<float>(before + Stencil::kAt[p] * step);
    sum += Stencil::kWeight[p] * f();
  }
  element = before;
  return sum / step;
}

/// Compares a gradient with finite differences and reports the worst element. `tolerance` is relative to the largest.
inline void expect_gradient(const char* name, const std::vector<double>& differences, const float* gradient,
                            double tolerance) {
  double largest = 0;
  double worst = 0;
  std::size_t at = 0;
  for (std::size_t i = 0; i < differences.size(); ++i) {
    largest = std::max(largest, std::abs(differences[i]));
    const double miss = std::abs(differences[i] - gradient[i]);
    if (!(miss <= worst)) worst = miss, at = i;
  }
  EXPECT_GT(largest, 0) << name << " is zero everywhere: nothing was tested";
  EXPECT_LE(worst, tolerance * largest) << name << "[" << at << "] is " << gradient[at] << ", by differences "
                                        << differences[at];
}

}  // namespace expar::test
