// Elements of tensors that are f32 or bf16, one at a time.
#pragma once

#include <cstdint>

#include <expar/tensor.h>

namespace expar::test {

inline float value(const ConstTensor& tensor, std::int64_t i) {
  return tensor.dtype() == DType::f32 ? tensor.as<float>()[i] : static_cast<float>(tensor.as<bf16>()[i]);
}

inline void set(const Tensor& tensor, std::int64_t i, float value) {
  if (tensor.dtype() == DType::f32) {
    tensor.as<float>()[i] = value;
  } else {
    tensor.as<bf16>()[i] = bf16(value);
  }
}

/// As it is stored.
inline float rounded(float value, DType dtype) {
  return dtype == DType::bf16 ? static_cast<float>(bf16(value)) : value;
}

}  // namespace expar::test
