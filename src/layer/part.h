// The part of a matrix that a rank holds where experts lie in slices.
#pragma once

#include <cstdint>

#include <expar/plan.h>
#include <expar/tensor.h>

namespace expar {

/// The same rows of each of several blocks of rows (gate and up), and the same columns of each row.
struct MatrixPart {
  Shape whole;  // [N, K]
  std::int64_t blocks = 1;
  ExpertRange rows, columns;  // of a block, and of a row

  static MatrixPart all(std::int64_t n, std::int64_t k) { return {{n, k}, 1, {0, n}, {0, k}}; }
  Shape shape() const { return {blocks * rows.count, columns.count}; }
  /// Which element of the whole is the first of row `r` here.
  std::int64_t start(std::int64_t r) const {
    const std::int64_t row = r / rows.count * (whole[0] / blocks) + rows.first + r % rows.count;
    return row * whole[1] + columns.first;
  }
};

/// Copies the part of `whole` to `part`, both of one dtype.
void take_part(const MatrixPart& of, ConstTensor whole, Tensor part);

}  // namespace expar
