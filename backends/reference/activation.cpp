// Activations and their gradients, by the formulas of their papers and libm.
#include <cmath>
#include <limits>
#include <numbers>

#include "backends/reference/kernels.h"
#include "src/util/processor.h"

namespace expar::reference {
namespace {

float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

/// The normal distribution's integral up to x, and its density.
float normal_integral(float x) { return std::erfc(-x * (std::numbers::sqrt2_v<float> / 2)) / 2; }
float normal_density(float x) {
  return std::exp(-x * x / 2) * (std::numbers::inv_sqrtpi_v<float> / std::numbers::sqrt2_v<float>);
}

/// An activation of one number, and its derivative.
struct Curve {
  float value, slope;
};

// SwiGLU and GEGLU: Shazeer 2020; GELU: Hendrycks & Gimpel 2016; ReLU^2: So et al. 2021.
Curve curve(Activation act, float alpha, float x) {
  switch (act) {
    case Activation::swiglu:
    case Activation::silu: {
      const float s = sigmoid(alpha * x);
      return {x * s, s + alpha * x * s * (1 - s)};
    }
    case Activation::gelu:
    case Activation::geglu:
      return {x * normal_integral(x), normal_integral(x) + x * normal_density(x)};
    case Activation::relu2:
      break;
  }
  return x < 0 ? Curve{0, 0} : Curve{x * x, 2 * x};
}

/// A number between limits, and whether it stands still there while what was clamped moves on.
struct Clamped {
  Clamped(float x, float low, float high) : value(x < low ? low : x > high ? high : x), held(x < low || x > high) {}
  float value;
  bool held;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

void activate(const Activate& p, Pool& pool) {
  const auto [alpha, limit, offset] = p.numbers;
  pool.run(p.rows, [&, alpha, limit, offset](std::int64_t i, int) {
    const FloatMode mode;
    for (std::int64_t f = 0; f < p.inner; ++f) {
      float h = 0;
      if (gated(p.act)) {
        const Clamped gate(load(p.pre, p.dtype, i * 2 * p.inner + f), -kInfinity, limit);
        const Clamped up(load(p.pre, p.dtype, (i * 2 + 1) * p.inner + f), -limit, limit);
        h = curve(p.act, alpha, gate.value).value * (up.value + offset);
      } else {
        h = curve(p.act, alpha, load(p.pre, p.dtype, i * p.inner + f)).value;
      }
      store(p.h, p.dtype, i * p.inner + f, h);
    }
  });
}

void activate_grad(const ActivateGrad& p, Pool& pool) {
  const auto [alpha, limit, offset] = p.numbers;
  pool.run(p.rows, [&, alpha, limit, offset](std::int64_t i, int) {
    const FloatMode mode;
    for (std::int64_t f = 0; f < p.inner; ++f) {
      const float dh = load(p.dh, p.dtype, i * p.inner + f);
      if (gated(p.act)) {
        const std::int64_t at_gate = i * 2 * p.inner + f, at_up = at_gate + p.inner;
        const Clamped gate(load(p.pre, p.dtype, at_gate), -kInfinity, limit);
        const Clamped up(load(p.pre, p.dtype, at_up), -limit, limit);
        const Curve c = curve(p.act, alpha, gate.value);
        store(p.dpre, p.dtype, at_gate, gate.held ? 0 : dh * (up.value + offset) * c.slope);
        store(p.dpre, p.dtype, at_up, up.held ? 0 : dh * c.value);
      } else {
        const std::int64_t at = i * p.inner + f;
        store(p.dpre, p.dtype, at, dh * curve(p.act, alpha, load(p.pre, p.dtype, at)).slope);
      }
    }
  });
}

}  // namespace expar::reference
