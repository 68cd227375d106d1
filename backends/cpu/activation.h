// Activations and their gradients: loops over numbers.
#pragma once

#include "backends/cpu/number.h"
#include "backends/cpu/work.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

/// An activation of one number, and its derivative.
struct Curve {
  float value, slope;
};

struct SigmoidCurve {
  float alpha;
  Curve operator()(float x) const {
    const float s = sigmoid(alpha * x), value = x * s;
    return {value, fma(alpha * value, 1 - s, s)};
  }
};
struct NormalCurve {
  Curve operator()(float x) const {
    const Normal n = normal(x);
    return {x * n.integral, fma(x, n.density, n.integral)};
  }
};
struct SquareCurve {
  Curve operator()(float x) const {
    const float positive = x < 0 ? 0 : x;
    return {positive * positive, 2 * positive};
  }
};

/// Calls body(curve) with the curve of `act`, so that it is chosen outside of the loops.
template <class Body>
void with_curve(Activation act, const ActivationNumbers& numbers, const Body& body) {
  switch (act) {
    case Activation::swiglu:
    case Activation::silu:
      return body(SigmoidCurve{numbers.alpha});
    case Activation::gelu:
    case Activation::geglu:
      return body(NormalCurve{});
    case Activation::relu2:
      return body(SquareCurve{});
  }
}

// What is not below a limit or above it is kept, NaN with it.
inline float at_most(float limit, float x) { return x > limit ? limit : x; }
inline float magnitude(float x) { return as_float(as_word(x) & 0x7fffffffu); }
inline float at_least(float limit, float x) { return x < limit ? limit : x; }

template <class E, class ToCurve>
void activate_gated(const ActivationNumbers& numbers, const ToCurve& curve, const E* pre, std::int64_t inner, E* h) {
  const float limit = numbers.limit, offset = numbers.offset;
  const E* const up = pre + inner;
#pragma GCC ivdep
  for (std::int64_t f = 0; f < inner; ++f) {
    const float u = at_least(-limit, at_most(limit, widen(up[f])));
    h[f] = narrow<E>(curve(at_most(limit, widen(pre[f]))).value * (u + offset));
  }
}

template <class E, class ToCurve>
void activate_plain(const ToCurve& curve, const E* x, std::int64_t inner, E* h) {
#pragma GCC ivdep
  for (std::int64_t f = 0; f < inner; ++f) h[f] = narrow<E>(curve(widen(x[f])).value);
}

template <class E, class ToCurve>
void activate_grad_gated(const ActivationNumbers& numbers, const ToCurve& curve, const E* pre, const E* dh,
                         std::int64_t inner, E* dpre) {
  const float limit = numbers.limit, offset = numbers.offset;
  const E* const up = pre + inner;
  E* const dup = dpre + inner;
#pragma GCC ivdep
  for (std::int64_t f = 0; f < inner; ++f) {
    const float gate = widen(pre[f]), u = widen(up[f]), d = widen(dh[f]);
    const float factor = at_least(-limit, at_most(limit, u)) + offset;
    const Curve c = curve(at_most(limit, gate));
    const float dgate = d * factor * c.slope, du = d * c.value;
    dup[f] = narrow<E>(magnitude(u) > limit ? 0 : du);
    dpre[f] = narrow<E>(gate > limit ? 0 : dgate);
  }
}

template <class E, class ToCurve>
void activate_grad_plain(const ToCurve& curve, const E* x, const E* dh, std::int64_t inner, E* dx) {
#pragma GCC ivdep
  for (std::int64_t f = 0; f < inner; ++f) dx[f] = narrow<E>(widen(dh[f]) * curve(widen(x[f])).slope);
}

inline void activate(const Activate& p, Pool& pool) {
  const std::int64_t columns = gated(p.act) ? 2 * p.inner : p.inner;
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    const E* const pre = static_cast<const E*>(p.pre);
    E* const h = static_cast<E*>(p.h);
    with_curve(p.act, p.numbers, [&](const auto& curve) {
      for_blocks(pool, p.rows, columns * static_cast<std::int64_t>(sizeof(E)), [&](std::int64_t i, std::int64_t last) {
        for (; i < last; ++i) {
          if (gated(p.act)) {
            activate_gated(p.numbers, curve, pre + i * columns, p.inner, h + i * p.inner);
          } else {
            activate_plain(curve, pre + i * columns, p.inner, h + i * p.inner);
          }
        }
      });
    });
  });
}

inline void activate_grad(const ActivateGrad& p, Pool& pool) {
  const std::int64_t columns = gated(p.act) ? 2 * p.inner : p.inner;
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    const E* const pre = static_cast<const E*>(p.pre);
    const E* const dh = static_cast<const E*>(p.dh);
    E* const dpre = static_cast<E*>(p.dpre);
    with_curve(p.act, p.numbers, [&](const auto& curve) {
      for_blocks(
          pool, p.rows, 2 * columns * static_cast<std::int64_t>(sizeof(E)), [&](std::int64_t i, std::int64_t last) {
            for (; i < last; ++i) {
              if (gated(p.act)) {
                activate_grad_gated(p.numbers, curve, pre + i * columns, dh + i * p.inner, p.inner, dpre + i * columns);
              } else {
                activate_grad_plain(curve, pre + i * columns, dh + i * p.inner, p.inner, dpre + i * columns);
              }
            }
          });
    });
  });
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
