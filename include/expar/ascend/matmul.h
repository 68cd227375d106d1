// Ascend's grouped product: the rows of each expert with its matrix, and the gradient of those matrices.
#pragma once

#include <cstdint>
#include <optional>

#include <expar/context.h>

namespace expar::ascend {

struct GroupedMatmulOptions {
  ConstTensor bias = {};                   // [E, N] f32, bf16 or f16; of int8 rows also int32
  ConstTensor scale = {};                  // of int8 rows: [E, N] f32
  ConstTensor per_token_scale = {};        // of int8 rows: [M] f32
  ConstTensor group_list = {};             // [E] int64, needed: the rows of each group
  std::int64_t group_type = 0;             // what the groups split: 0 rows, 2 what is summed over
  std::int64_t group_list_type = 0;        // group_list has 0 sums so far, 1 counts
  std::optional<DType> output_dtype = {};  // f32, bf16 or f16; none: that of x. Of int8 rows needed; int32: the sums
};

/// group_type 0: y[i] = x[i] weight[e] + bias[e] of each row i of group e; rows beyond the groups are zeros.
///   x       : [M, K]     f32, bf16, f16 or int8
///   weight  : [E, K, N]  dtype of x
///   returns : [M, N]     of int8 rows (x[i] weight[e]) * scale[e] * per_token_scale[i] + bias[e], a bias of int32
///                        added before the scales
/// group_type 2: y[e] = (rows of group e of x)^T (those of weight), the gradient of the weight of group_type 0 from its
/// x and the gradient of y.
///   x       : [K, M]  f32, bf16 or f16: what torch's transposed x has in memory
///   weight  : [K, N]  dtype of x
///   returns : [E, M, N], zeros of a group without rows
/// Summed in f32, rounded once: in index order, of bf16 two by two, the odd one first, with subnormals as zeros;
/// products of int8 exactly. Not collective. Throws Error: bad_argument (shapes, dtypes, a group_list of another E or
/// of more rows than there are, an option out of its range, missing, or of no use). Cost: that of the grouped GEMM
/// kernels; f16 is converted to f32 for them, int8 to bf16, in which its products are exact. Source:
/// npu_grouped_matmul.
Array grouped_matmul(const Context& context, ConstTensor x, ConstTensor weight, const GroupedMatmulOptions& options);

}  // namespace expar::ascend
