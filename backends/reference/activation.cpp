// SwiGLU and GELU and their gradients, by the formulas of their papers and libm.
#include <cmath>
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

}  // namespace

// SwiGLU (Shazeer 2020): silu(gate) * up. GELU (Hendrycks & Gimpel 2016): x * normal_integral(x).
void activate(const Activate& p, Pool& pool) {
  pool.run(p.rows, [&](std::int64_t i, int) {
    const FloatMode mode;
    for (std::int64_t f = 0; f < p.inner; ++f) {
      float h = 0;
      if (p.act == Activation::swiglu) {
        const float gate = load(p.pre, p.dtype, i * 2 * p.inner + f);
        const float up = load(p.pre, p.dtype, (i * 2 + 1) * p.inner + f);
        h = gate * sigmoid(gate) * up;
      } else {
        const float x = load(p.pre, p.dtype, i * p.inner + f);
        h = x * normal_integral(x);
      }
      store(p.h, p.dtype, i * p.inner + f, h);
    }
  });
}

void activate_grad(const ActivateGrad& p, Pool& pool) {
  pool.run(p.rows, [&](std::int64_t i, int) {
    const FloatMode mode;
    for (std::int64_t f = 0; f < p.inner; ++f) {
      const float dh = load(p.dh, p.dtype, i * p.inner + f);
      if (p.act == Activation::swiglu) {
        const std::int64_t at_gate = i * 2 * p.inner + f, at_up = at_gate + p.inner;
        const float gate = load(p.pre, p.dtype, at_gate), up = load(p.pre, p.dtype, at_up);
        const float s = sigmoid(gate);
        store(p.dpre, p.dtype, at_gate, dh * up * (s + gate * s * (1 - s)));
        store(p.dpre, p.dtype, at_up, dh * gate * s);
      } else {
        const std::int64_t at = i * p.inner + f;
        const float x = load(p.pre, p.dtype, at);
        store(p.dpre, p.dtype, at, dh * (normal_integral(x) + x * normal_density(x)));
      }
    }
  });
}

}  // namespace expar::reference
