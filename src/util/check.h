// What the checks of arguments share: one form for each kind of refusal. All throw Error bad_argument.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include <expar/error.h>
#include <expar/tensor.h>

namespace expar {

/// A size or an offset where the standard library wants one.
inline std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

[[noreturn]] void refuse(const std::string& message);

/// "f32 [4, 8]"
std::string shown(const ConstTensor& tensor);
/// "1, 2, 3"
std::string shown(std::span<const std::int64_t> values);

/// "x is bf16 [3, 4], should be f32 [4, 4]"
void require(const std::string& what, const ConstTensor& tensor, DType dtype, const Shape& shape);
/// The dtypes of rows. "x is int8, neither f32 nor bf16"
void require_rows(const std::string& what, const ConstTensor& tensor);
/// Every id of `ids` [T, K] int32 is an expert or, from `least` -1 on, none.
/// "ids[17,2] = 64 is no expert below 64 and not -1"
void require_experts(const std::string& what, const ConstTensor& ids, std::int64_t experts, std::int64_t least = -1);
/// "shards are [0, 5], should ascend from 0 to the 34 tokens of this rank"
void require_ascending(const std::string& what, std::span<const std::int64_t> bounds, std::int64_t tokens);

}  // namespace expar
