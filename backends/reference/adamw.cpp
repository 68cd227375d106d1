// One step of AdamW, as its definition in kernels.h reads.
#include <cmath>

#include "backends/reference/kernels.h"
#include "src/util/processor.h"

namespace expar::reference {

void adamw(const AdamWStep& p, Pool&) {
  const FloatMode mode;
  for (std::int64_t i = 0; i < p.count; ++i) {
    const float g = p.g[i];
    const float m = p.m[i] = p.beta1 * p.m[i] + (1 - p.beta1) * g;
    const float v = p.v[i] = p.beta2 * p.v[i] + (1 - p.beta2) * g * g;
    p.p[i] -= p.lr * (m / p.c1 / (std::sqrt(v / p.c2) + p.eps) + p.decay * p.p[i]);
    if (p.low) p.low[i] = bf16(p.p[i]);
  }
}

}  // namespace expar::reference
