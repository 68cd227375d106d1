// The grouped matrix products as triple loops.
#include "backends/reference/kernels.h"
#include "src/util/processor.h"

namespace expar::reference {
namespace {

/// Calls body(group, row) for every row.
template <class Body>
void for_rows(const Groups& groups, Pool& pool, Body body) {
  for (int g = 0; g < groups.count; ++g) {
    const std::int64_t first = groups.offsets[g];
    pool.run(groups.offsets[g + 1] - first, [&](std::int64_t i, int) {
      const FloatMode mode;
      body(g, first + i);
    });
  }
}

float weight(const GroupWeights& w, std::int64_t g, std::int64_t n, std::int64_t k, std::int64_t row,
             std::int64_t column) {
  return load(w.data, w.dtype, (g * n + row) * k + column);
}

}  // namespace

void gemm_nt(const GemmNT& p, Pool& pool) {
  for_rows(p.groups, pool, [&](int g, std::int64_t i) {
    for (std::int64_t n = 0; n < p.n; ++n) {
      float sum = 0;
      for (std::int64_t k = 0; k < p.k; ++k) {
        sum += load(p.rows, i, k) * weight(p.w, g, p.n, p.k, n, k);
      }
      if (p.bias) sum += (p.bias_weights ? p.bias_weights[i] : 1.0F) * p.bias[g * p.n + n];
      store(p.y, p.y_dtype, i * p.n + n, sum);
    }
  });
}

void gemm_nn(const GemmNN& p, Pool& pool) {
  for_rows(p.groups, pool, [&](int g, std::int64_t i) {
    for (std::int64_t k = 0; k < p.k; ++k) {
      float sum = 0;
      for (std::int64_t n = 0; n < p.n; ++n) {
        sum += load(p.dy, p.w.dtype, i * p.n + n) * weight(p.w, g, p.n, p.k, n, k);
      }
      store(p.dx, p.dx_dtype, i * p.k + k, sum);
    }
  });
}

void gemm_tn(const GemmTN& p, Pool& pool) {
  for (int g = 0; g < p.groups.count; ++g) {
    const std::int64_t first = p.groups.offsets[g], last = p.groups.offsets[g + 1];
    pool.run(p.n, [&](std::int64_t n, int) {
      const FloatMode mode;
      for (std::int64_t k = 0; k < p.k; ++k) {
        float sum = 0;
        for (std::int64_t i = first; i < last; ++i) {
          sum += load(p.dy, p.rows.dtype, i * p.n + n) * load(p.rows, i, k);
        }
        p.dw[(g * p.n + n) * p.k + k] = sum;
      }
      if (p.dbias == nullptr) return;
      float sum = 0;
      for (std::int64_t i = first; i < last; ++i) sum += load(p.dy, p.rows.dtype, i * p.n + n);
      p.dbias[g * p.n + n] = sum;
    });
  }
}

}  // namespace expar::reference
