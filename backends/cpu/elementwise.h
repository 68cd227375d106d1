// Activations, row movement, the router's softmax and AdamW: loops over numbers and rows.
#pragma once

#include "backends/cpu/number.h"
#include "backends/cpu/work.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

/// Calls body(E{}) with the element type of `dtype`.
template <class Body>
void with_element(DType dtype, const Body& body) {
  if (dtype == DType::bf16) {
    body(std::uint16_t{});
  } else {
    body(float{});
  }
}

// ---- Activations ---------------------------------------------------------------------------------

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

// ---- Rows ----------------------------------------------------------------------------------------

/// dot[r] = x[r] . y[r] for `kRows` rows at once: each is one slow chain, side by side they fill the pipeline.
template <int kRows, class E>
void dot_rows(const E* const* x, const E* y, std::int64_t width, float* dot) {
  float sum[kRows] = {};
  for (std::int64_t h = 0; h < width; ++h) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = fma(widen(x[r][h]), widen(y[r * width + h]), sum[r]);
  }
  for (int r = 0; r < kRows; ++r) dot[r] = sum[r];
}

template <class E>
void gather_rows(const Gather& p, std::int64_t first, std::int64_t last) {
  const std::int64_t width = p.rows.width;
  const auto row = [&](std::int64_t i) { return reinterpret_cast<const E*>(row_at(p.rows, i)); };
  if (p.other != nullptr) {
    const E* const other = static_cast<const E*>(p.other);
    std::int64_t i = first;
    for (; i + 8 <= last; i += 8) {
      const E* rows[8];
      for (int r = 0; r < 8; ++r) rows[r] = row(i + r);
      dot_rows<8>(rows, other + i * width, width, p.dot + i);
    }
    for (; i < last; ++i) {
      const E* const rows[1] = {row(i)};
      dot_rows<1>(rows, other + i * width, width, p.dot + i);
    }
  }
  if (p.out == nullptr) return;
  for (std::int64_t i = first; i < last; ++i) {
    const E* const from = row(i);
    E* const to = static_cast<E*>(p.out) + i * width;
    if (p.scaled && p.rows.refs != nullptr) {
      const float weight = p.rows.refs[i].weight;
#pragma GCC ivdep
      for (std::int64_t h = 0; h < width; ++h) to[h] = narrow<E>(widen(from[h]) * weight);
    } else if (width > 0) {
      __builtin_memcpy(to, from, static_cast<std::size_t>(width) * sizeof(E));
    }
  }
}

inline void gather(const Gather& p, Pool& pool) {
  with_element(p.rows.dtype, [&](auto element) {
    using E = decltype(element);
    const std::int64_t bytes = p.rows.width * static_cast<std::int64_t>(sizeof(E));
    for_blocks(pool, p.count, 2 * bytes, [&](std::int64_t i, std::int64_t last) { gather_rows<E>(p, i, last); });
  });
}

template <class E>
void norm_row(const E* x, std::int64_t t, std::int64_t width, const NormOutput& norm) {
  constexpr std::int64_t kChains = 8;
  float chains[kChains] = {};
  std::int64_t h = 0;
  for (; h + kChains <= width; h += kChains) {
    for (std::int64_t c = 0; c < kChains; ++c) {
      const float value = widen(x[h + c]);
      chains[c] += value * value;
    }
  }
  for (std::int64_t c = 0; h < width; ++h, ++c) chains[c] += widen(x[h]) * widen(x[h]);
  const float squares =
      ((chains[0] + chains[1]) + (chains[2] + chains[3])) + ((chains[4] + chains[5]) + (chains[6] + chains[7]));
  const float scale = 1.0F / __builtin_sqrtf(squares / static_cast<float>(width) + norm.epsilon);
  if (norm.scale != nullptr) norm.scale[t] = scale;
  E* const y = static_cast<E*>(norm.y) + t * width;
#pragma GCC ivdep
  for (std::int64_t i = 0; i < width; ++i) y[i] = narrow<E>(widen(narrow<E>(widen(x[i]) * scale)) * norm.gain[i]);
}

inline void rms_norm(const RmsNormRows& p, Pool& pool) {
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    for_blocks(pool, p.tokens, 2 * p.width * static_cast<std::int64_t>(sizeof(E)),
               [&](std::int64_t t, std::int64_t last) {
                 for (; t < last; ++t) norm_row(static_cast<const E*>(p.x) + t * p.width, t, p.width, p.norm);
               });
  });
}

/// Columns that a token's slots are summed over at once; their sums stay in registers or close to them.
constexpr std::int64_t kReduceColumns = 128;

template <class E>
void reduce_token(const Reduce& p, std::int64_t t) {
  const void* const* const slots = p.slots + t * p.topk;
  const float* const weights = p.weights ? p.weights + t * p.topk : nullptr;
  E* const out = static_cast<E*>(p.out) + t * p.width;
  const E* const residual = p.residual ? static_cast<const E*>(p.residual) + t * p.width : nullptr;
  for (std::int64_t first = 0; first < p.width; first += kReduceColumns) {
    const std::int64_t columns = smaller(kReduceColumns, p.width - first);
    float sum[kReduceColumns] = {};
    for (std::int64_t k = 0; k < p.topk; ++k) {
      if (slots[k] == nullptr) continue;
      const E* const slot = static_cast<const E*>(slots[k]) + first;
      const float weight = weights ? weights[k] : 1.0F;  // a product with one is exact
      for (std::int64_t h = 0; h < columns; ++h) sum[h] = fma(weight, widen(slot[h]), sum[h]);
    }
    if (p.shared != nullptr) {
      const float* const shared = p.shared + t * p.width + first;
      const float weight = p.shared_weights ? p.shared_weights[t] : 1.0F;
      for (std::int64_t h = 0; h < columns; ++h) sum[h] = fma(weight, shared[h], sum[h]);
    }
    if (residual != nullptr) {
      for (std::int64_t h = 0; h < columns; ++h) sum[h] += widen(residual[first + h]);
    }
    for (std::int64_t h = 0; h < columns; ++h) out[first + h] = narrow<E>(sum[h]);
  }
  if (p.norm.gain != nullptr) norm_row(out, t, p.width, p.norm);
}

inline void reduce(const Reduce& p, Pool& pool) {
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    for_blocks(pool, p.tokens, (p.topk + 1) * p.width * static_cast<std::int64_t>(sizeof(E)),
               [&](std::int64_t t, std::int64_t last) {
                 for (; t < last; ++t) reduce_token<E>(p, t);
               });
  });
}

// ---- Router --------------------------------------------------------------------------------------

/// The largest scores, descending. A score goes behind those that are not smaller, so ties keep the order of indexes.
inline void take_largest(const float* scores, std::int64_t experts, std::int64_t topk, std::int32_t* ids, float* top) {
  std::int64_t found = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    if (found == topk && !(scores[e] > top[topk - 1])) continue;
    std::int64_t place = found < topk ? found++ : topk - 1;
    for (; place > 0 && scores[e] > top[place - 1]; --place) {
      top[place] = top[place - 1];
      ids[place] = ids[place - 1];
    }
    top[place] = scores[e];
    ids[place] = static_cast<std::int32_t>(e);
  }
}

inline void softmax_topk(const SoftmaxTopK& p, Pool& pool) {
  for_blocks(pool, p.tokens, p.experts * 32, [&](std::int64_t t, std::int64_t last) {
    for (; t < last; ++t) {
      const float* const logits = p.logits + t * p.experts;
      float* const scores = p.scores + t * p.experts;
      float largest = logits[0];
      for (std::int64_t e = 1; e < p.experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
#pragma GCC ivdep
      for (std::int64_t e = 0; e < p.experts; ++e) scores[e] = exp(logits[e] - largest);
      float sum = 0;
      for (std::int64_t e = 0; e < p.experts; ++e) sum += scores[e];
#pragma GCC ivdep
      for (std::int64_t e = 0; e < p.experts; ++e) scores[e] /= sum;
      p.logsumexp[t] = largest + log(sum);
      take_largest(scores, p.experts, p.topk, p.ids + t * p.topk, p.top + t * p.topk);
    }
  });
}

// ---- AdamW ---------------------------------------------------------------------------------------

inline void adamw(const AdamWStep& p, Pool& pool) {
  const FloatMode mode;  // for the four constants
  const float keep1 = 1 - p.beta1, keep2 = 1 - p.beta2, over_c1 = 1 / p.c1, over_c2 = 1 / p.c2;
  for_blocks(pool, p.count, 16, [&](std::int64_t first, std::int64_t last) {
#pragma GCC ivdep
    for (std::int64_t i = first; i < last; ++i) {
      const float g = p.g[i] * p.grad_scale;
      const float m = fma(p.beta1, p.m[i], keep1 * g);
      const float v = fma(p.beta2, p.v[i], keep2 * g * g);
      const float step = m * over_c1 / (__builtin_sqrtf(v * over_c2) + p.eps);
      p.m[i] = m;
      p.v[i] = v;
      p.p[i] = fma(-p.lr, fma(p.decay, p.p[i], step), p.p[i]);
    }
    if (p.low == nullptr) return;
    std::uint16_t* const low = reinterpret_cast<std::uint16_t*>(p.low);
#pragma GCC ivdep
    for (std::int64_t i = first; i < last; ++i) low[i] = narrow<std::uint16_t>(p.p[i]);
  });
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
