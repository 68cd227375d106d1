// The results' int8: a scale for each 8 values (comm_quant_mode 2).
#pragma once

#include <cstddef>

#include <expar/pool.h>
#include <expar/tensor.h>

namespace expar::ascend {

/// out [.., quant_expand_bytes(H)]: of each row of `rows` [n, H], f16 or bf16, q = x / scale rounded half to even, with
/// scale = max|x| / 127 of each 8 values; from the next multiple of 32 bytes on the scales, rounded to the rows' dtype.
/// Zeros have a scale of 0; 8 values of which one is NaN or infinite a scale of NaN.
void comm_quantise(Pool& pool, ConstTensor rows, Tensor out);

/// out [H] f16 or bf16 = q * the rounded scale, in f32, rounded. The dtype is that of the rows above.
void comm_dequantise(const std::byte* row, Tensor out);

}  // namespace expar::ascend
