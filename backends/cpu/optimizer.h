// AdamW.
#pragma once

#include "backends/cpu/number.h"
#include "backends/cpu/work.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

inline void adamw(const AdamWStep& p, Pool& pool) {
  const FloatMode mode;  // for the four constants
  const float keep1 = 1 - p.beta1, keep2 = 1 - p.beta2, over_c1 = 1 / p.c1, over_c2 = 1 / p.c2;
  for_blocks(pool, p.count, 16, [&](std::int64_t first, std::int64_t last) {
#pragma GCC ivdep
    for (std::int64_t i = first; i < last; ++i) {
      const float g = p.g[i];
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
