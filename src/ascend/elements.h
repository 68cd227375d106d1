// What the operators share: integers and numbers of several dtypes, one at a time, and the refusal of what is out of
// its range.
#pragma once

#include <cstdint>
#include <string>

#include <expar/tensor.h>

#include "src/util/check.h"

namespace expar::ascend {

/// An element of an int32 or int64 tensor.
inline std::int64_t integer(const ConstTensor& tensor, std::int64_t i) {
  return tensor.dtype() == DType::int32 ? tensor.as<std::int32_t>()[i] : tensor.as<std::int64_t>()[i];
}
inline void set_integer(const Tensor& tensor, std::int64_t i, std::int64_t value) {
  if (tensor.dtype() == DType::int32) {
    tensor.as<std::int32_t>()[i] = static_cast<std::int32_t>(value);
  } else {
    tensor.as<std::int64_t>()[i] = value;
  }
}

/// An element of an f32, bf16 or f16 tensor.
inline float number(const ConstTensor& tensor, std::int64_t i) {
  if (tensor.dtype() == DType::f32) return tensor.as<float>()[i];
  if (tensor.dtype() == DType::bf16) return static_cast<float>(tensor.as<bf16>()[i]);
  return static_cast<float>(tensor.as<f16>()[i]);
}
/// Rounded to nearest even.
inline void set_number(const Tensor& tensor, std::int64_t i, float value) {
  if (tensor.dtype() == DType::f32) {
    tensor.as<float>()[i] = value;
  } else if (tensor.dtype() == DType::bf16) {
    tensor.as<bf16>()[i] = bf16(value);
  } else {
    tensor.as<f16>()[i] = f16(value);
  }
}

/// The same numbers in another dtype, each rounded to nearest even.
Array converted(const ConstTensor& tensor, DType dtype);

/// "world_size is 1, should be from 2 to 384"
void require_range(const std::string& what, std::int64_t value, std::int64_t least, std::int64_t most);
/// The same of an element, "row_idx[3] is 9, ...", and of one of a matrix, "expert_ids[3,1] is 9, ...".
void require_range(const char* what, std::int64_t i, std::int64_t value, std::int64_t least, std::int64_t most);
void require_range(const char* what, std::int64_t row, std::int64_t column, std::int64_t value, std::int64_t least,
                   std::int64_t most);

/// "x is f32 [3], should have 2 axes"
void require_axes(const std::string& what, const ConstTensor& tensor, int axes);
/// "expert_ids is f32 [3, 4], should be int32 or int64"
void require_integers(const std::string& what, const ConstTensor& tensor);
/// "x is int8 [3, 4], should be f32, bf16 or f16"
void require_numbers(const std::string& what, const ConstTensor& tensor);

}  // namespace expar::ascend
