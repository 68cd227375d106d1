// Gathering rows by list, summing a token's rows by weight, and their norm.
#include <cmath>

#include "backends/reference/kernels.h"
#include "src/util/processor.h"

namespace expar::reference {

void gather(const Gather& p, Pool& pool) {
  const std::int64_t width = p.rows.width;
  pool.run(p.count, [&](std::int64_t i, int) {
    const FloatMode mode;
    float dot = 0;
    for (std::int64_t h = 0; h < width; ++h) {
      const float value = load(p.rows, i, h);
      if (p.out) store(p.out, p.rows.dtype, i * width + h, p.weights ? value * p.weights[i] : value);
      if (p.other) dot += value * load(p.other, p.rows.dtype, i * width + h);
    }
    if (p.other) p.dot[i] = dot;
  });
}

namespace {

void norm_row(const void* rows, DType dtype, std::int64_t t, std::int64_t width, const NormOutput& norm) {
  float chains[8] = {};
  for (std::int64_t h = 0; h < width; ++h) {
    const float value = load(rows, dtype, t * width + h);
    chains[h % 8] += value * value;
  }
  const float squares =
      ((chains[0] + chains[1]) + (chains[2] + chains[3])) + ((chains[4] + chains[5]) + (chains[6] + chains[7]));
  const float scale = 1.0F / std::sqrt(squares / static_cast<float>(width) + norm.epsilon);
  if (norm.scale) norm.scale[t] = scale;
  for (std::int64_t i = t * width; i < (t + 1) * width; ++i) {
    store(norm.y, dtype, i, load(rows, dtype, i) * scale);
    store(norm.y, dtype, i, load(norm.y, dtype, i) * norm.gain[i - t * width]);
  }
}

}  // namespace

void rms_norm(const RmsNormRows& p, Pool& pool) {
  pool.run(p.tokens, [&](std::int64_t t, int) {
    const FloatMode mode;
    norm_row(p.x, p.dtype, t, p.width, p.norm);
  });
}

void reduce(const Reduce& p, Pool& pool) {
  pool.run(p.tokens, [&](std::int64_t t, int) {
    const FloatMode mode;
    for (std::int64_t h = 0; h < p.width; ++h) {
      float sum = 0;
      for (std::int64_t k = 0; k < p.topk; ++k) {
        const void* slot = p.slots[t * p.topk + k];
        if (slot == nullptr) continue;
        sum += (p.weights ? p.weights[t * p.topk + k] : 1.0F) * load(slot, p.dtype, h);
      }
      if (p.shared) sum += (p.shared_weights ? p.shared_weights[t] : 1.0F) * p.shared[t * p.width + h];
      if (p.residual) sum += load(p.residual, p.dtype, t * p.width + h);
      store(p.out, p.dtype, t * p.width + h, sum);
    }
    if (p.norm.gain) norm_row(p.out, p.dtype, t, p.width, p.norm);
  });
}

}  // namespace expar::reference
