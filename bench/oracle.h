// An expert in double precision, read like the formula, to check results against.
#pragma once

#include <cstdint>
#include <vector>

#include "bench/bench.h"

namespace expar::bench {

/// One expert's weights, unpacked, as the kernels read them. Biases may be null.
struct PlainExpert {
  ConstTensor up;    // [up_rows, H]
  ConstTensor down;  // [H, F]
  const float* up_bias = nullptr;
  const float* down_bias = nullptr;
};

/// What an element should be, and how large the sum it comes from is: rounding errors are in proportion to that.
struct Expected {
  std::vector<double> value;   // [H]
  std::vector<double> square;  // [H] sum of the squares of the terms
};

/// y = down(act(up x + up_bias)) + down_bias
Expected feed_forward(const ExpertShape& shape, const PlainExpert& expert, const std::vector<double>& x);

/// Row `row` of a [.., width] tensor of f32 or bf16.
std::vector<double> read_row(ConstTensor tensor, std::int64_t row);

/// Elements of `got` that rounding alone cannot explain. NaN is wrong.
std::int64_t count_wrong(const std::vector<double>& got, const Expected& expected, DType dtype);

}  // namespace expar::bench
