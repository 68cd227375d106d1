// Moving rows and adding them up, and the norm of a row.
#pragma once

#include "backends/cpu/number.h"
#include "backends/cpu/work.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

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
    if (p.weights != nullptr) {
      const float weight = p.weights[i];
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

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
