// How the operators' rows are quantised: their quant_mode, one row at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include <expar/tensor.h>

namespace expar::ascend {

/// The operators' quant_mode: how many values of a row share a scale, and which.
///   none         values as they are
///   static_scale the caller's: q = x * scale + offset
///   per_token    a row's max |v| becomes the largest q: 127 of int8, 448 of fp8_e4m3, 57344 of fp8_e5m2
///   per_group    the same for each 128 values
///   mx           for each 32 values a power of two: 2^(floor(log2 max |v|) - 8), of fp8_e5m2 2^(... - 15)
enum class QuantMode : std::uint8_t { none = 0, static_scale = 1, per_token = 2, per_group = 3, mx = 4 };

struct Quantisation {
  QuantMode mode = QuantMode::none;
  DType dtype = DType::int8;           // of the values; with mode none that of the rows
  std::span<const float> offset = {};  // of static_scale: of each value, or one for all, or empty for 0
};

/// The quantisation of rows of `x`. Without y_dtype int8, for per_group and mx fp8_e4m3.
/// Throws Error: bad_argument (quant_mode not from 0 to 4; values that it has not; rows not f32, bf16 or f16).
Quantisation checked_quantisation(std::int64_t quant_mode, DType x, std::optional<DType> y_dtype = {});

/// Scales that a row carries, and their dtype, f32 or fp8_e8m0. An odd count of mx is padded by a scale of 0 bits.
std::int64_t scales_of_row(const Quantisation& quantisation, std::int64_t width);
DType scale_dtype(const Quantisation& quantisation);

/// Bytes of the values and of the scales of a row.
std::int64_t value_bytes(const Quantisation& quantisation, std::int64_t width);
std::int64_t scale_bytes(const Quantisation& quantisation, std::int64_t width);

/// Bytes of a row as it is sent: values, then scales from the next multiple of 32 on, to a multiple of 512.
std::int64_t scales_at(const Quantisation& quantisation, std::int64_t width);
std::int64_t message_bytes(const Quantisation& quantisation, std::int64_t width);

/// v = x * smooth, in f32; q = v / scale, rounded half to even, beyond the largest the largest; x is about q * scale.
///   row    : [width] f32, bf16 or f16
///   smooth : of each value, or one for all, or empty for 1; with static_scale the scale
///   values : value_bytes; scales : scale_bytes, aligned for their dtype, or null where there are none
/// Where all v that share a scale are 0, their q and scale are 0. Where one is NaN or infinite, their scale is NaN and
/// their q are 0; with static_scale NaN gives 0, infinity the largest. Numbers below 2^-126 count as 0, scales too.
/// Cost: two reads of the row.
void quantise_row(const Quantisation& quantisation, ConstTensor row, std::span<const float> smooth, std::byte* values,
                  std::byte* scales);

}  // namespace expar::ascend
