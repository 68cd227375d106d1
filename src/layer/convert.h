// Between the f32 of the router and the masters and the bf16 of rows and weights.
#pragma once

#include <expar/tensor.h>

#include "src/util/ranges.h"

namespace expar {

inline constexpr std::int64_t kConvertGrain = 65536;  // elements per task: some ten microseconds

inline void to_bf16(const ConstTensor& from, const Tensor& to, Pool& pool) {
  const float* in = from.as<float>();
  bf16* out = to.as<bf16>();
  for_ranges(pool, to.elements(), kConvertGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) out[i] = bf16(in[i]);
  });
}

inline void to_f32(const ConstTensor& from, const Tensor& to, Pool& pool) {
  const bf16* in = from.as<bf16>();
  float* out = to.as<float>();
  for_ranges(pool, to.elements(), kConvertGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) out[i] = static_cast<float>(in[i]);
  });
}

/// `rows` in f32: themselves, or a copy in `memory`.
inline ConstTensor in_f32(const ConstTensor& rows, Buffer& memory, Pool& pool) {
  if (rows.dtype() == DType::f32) return rows;
  const Tensor converted = memory.view(DType::f32, rows.shape());
  to_f32(rows, converted, pool);
  return converted;
}

}  // namespace expar
