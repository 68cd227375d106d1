// The quantisation modes of the operators, in f32.
#include "src/ascend/quantise.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "src/util/check.h"
#include "src/util/processor.h"

namespace expar::ascend {
namespace {

constexpr std::int64_t kPiece = 256;  // values that are worked on at a time; a multiple of every group
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::int64_t round_up(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }

/// What a dtype of quantised values can hold.
struct Range {
  DType dtype;
  float largest;
  int exponent;  // of the largest
};
constexpr Range kRanges[] = {
    {DType::int8, 127, 6},
    {DType::fp8_e4m3, 448, 8},
    {DType::fp8_e5m2, 57344, 15},
};

const Range* find_range(DType dtype) {
  const auto* const found =
      std::find_if(std::begin(kRanges), std::end(kRanges), [&](const Range& r) { return r.dtype == dtype; });
  return found == std::end(kRanges) ? nullptr : found;
}

/// A piece of a row in f32, multiplied by its smooth scales.
class Piece {
 public:
  Piece(ConstTensor row, std::span<const float> smooth, std::int64_t first)
      : count_(std::min(kPiece, row.elements() - first)) {
    if (row.dtype() == DType::f32) {
      widen(row.as<float>() + first);
    } else if (row.dtype() == DType::bf16) {
      widen(row.as<bf16>() + first);
    } else {
      widen(row.as<f16>() + first);
    }
    apply(smooth, first, [](float value, float factor) { return value * factor; });
  }

  void add(std::span<const float> offset, std::int64_t first) {
    apply(offset, first, [](float value, float term) { return value + term; });
  }

  std::int64_t count() const { return count_; }
  const float* values() const { return values_.data(); }

 private:
  template <class T>
  void widen(const T* from) {
    for (std::int64_t i = 0; i < count_; ++i) values_[at(i)] = static_cast<float>(from[i]);
  }

  /// By one number for all values, by one for each, or by none.
  template <class Operation>
  void apply(std::span<const float> numbers, std::int64_t first, const Operation& operation) {
    if (numbers.size() == 1) {
      for (std::int64_t i = 0; i < count_; ++i) values_[at(i)] = operation(values_[at(i)], numbers[0]);
    } else if (!numbers.empty()) {
      for (std::int64_t i = 0; i < count_; ++i) values_[at(i)] = operation(values_[at(i)], numbers[at(first + i)]);
    }
  }

  std::int64_t count_;
  std::array<float, kPiece> values_;
};

/// The largest magnitude so far, or NaN. As words NaN is above infinity, and infinity above all numbers.
std::uint32_t most_of(std::uint32_t most, const float* values, std::int64_t count) {
  auto signed_most = static_cast<std::int32_t>(most);  // the baseline's vectors compare signed words only
  for (std::int64_t i = 0; i < count; ++i) {
    signed_most = std::max(signed_most, std::bit_cast<std::int32_t>(values[i]) & 0x7fffffff);
  }
  return static_cast<std::uint32_t>(signed_most);
}

bool is_finite(std::uint32_t magnitude) { return magnitude < 0x7f800000u; }

/// What values are multiplied by, and the scale that undoes it.
struct Scale {
  float scale = 0, inverse = 0;
};

Scale scale_of(std::uint32_t most, float largest) {
  if (!is_finite(most)) return {kNan, 0};
  const auto magnitude = std::bit_cast<float>(most);
  // Below, the scale would be subnormal.
  if (magnitude < largest * std::numeric_limits<float>::min()) return {};
  return {magnitude / largest, largest / magnitude};
}

// The codes of a value within the range, to nearest even: an addition leaves the rounded number in the low bits. Loops
// over these vectorise, which the conversions of tensor.h do not.

struct ToInt8 {
  std::byte operator()(float value) const {
    return static_cast<std::byte>(std::bit_cast<std::uint32_t>(value + 0x1.8p23F));
  }
};

template <std::uint32_t kMantissa, std::uint32_t kBias>
struct ToFp8 {
  std::byte operator()(float value) const {
    constexpr std::uint32_t kShift = 23 - kMantissa, kLeastNormal = (128 - kBias) << 23;
    constexpr float kUnits = std::bit_cast<float>((151 - kBias - kMantissa) << 23);  // its last bit: a subnormal's unit
    const auto u = std::bit_cast<std::uint32_t>(value), a = u & 0x7fffffffu;
    const std::uint32_t even = (a >> kShift) & 1u;
    const std::uint32_t normal = ((a + (1u << (kShift - 1)) - 1u + even) >> kShift) - ((127 - kBias) << kMantissa);
    const std::uint32_t subnormal =
        std::bit_cast<std::uint32_t>(std::bit_cast<float>(a) + kUnits) - std::bit_cast<std::uint32_t>(kUnits);
    const std::uint32_t is_normal = 0u - static_cast<std::uint32_t>(a >= kLeastNormal);
    return static_cast<std::byte>((normal & is_normal) | (subnormal & ~is_normal) | ((u >> 24) & 0x80u));
  }
};

/// values[i] * factor, between the ends; NaN becomes 0.
template <class ToCode>
void narrow(const ToCode& to_code, const float* values, std::int64_t count, float factor, float least, float most,
            std::byte* out) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < count; ++i) {
    const auto u = std::bit_cast<std::uint32_t>(values[i] * factor);
    const std::uint32_t is_number = 0u - static_cast<std::uint32_t>((u & 0x7fffffffu) <= 0x7f800000u);
    const auto value = std::bit_cast<float>(u & is_number);  // without a branch, and so are the clamps
    out[i] = to_code(std::min(most, std::max(least, value)));
  }
}

void narrow(const float* values, std::int64_t count, float factor, const Range& range, std::byte* out) {
  const float most = range.largest;
  if (range.dtype == DType::int8) {
    narrow(ToInt8{}, values, count, factor, -128, most, out);
  } else if (range.dtype == DType::fp8_e4m3) {
    narrow(ToFp8<3, 7>{}, values, count, factor, -most, most, out);
  } else {
    narrow(ToFp8<2, 15>{}, values, count, factor, -most, most, out);
  }
}

/// The values over their scale; zeros where it has no inverse.
void scale_down(const float* values, std::int64_t count, float inverse, const Range& range, std::byte* out) {
  if (inverse == 0) {
    std::memset(out, 0, at(count));
  } else {
    narrow(values, count, inverse, range, out);
  }
}

void store(float value, std::byte* to) { std::memcpy(to, &value, sizeof value); }

/// A scale of mx: its bits, and what values are multiplied by.
struct PowerOfTwo {
  std::uint8_t bits = 0;
  float inverse = 0;
};

PowerOfTwo power_of(std::uint32_t most, int exponent) {
  if (!is_finite(most)) return {0xff, 0};
  const auto biased = static_cast<int>(most >> 23);  // floor(log2) + 127
  if (biased == 0) return {};
  const int bits = std::max(biased - exponent, 0);
  return {static_cast<std::uint8_t>(bits), std::bit_cast<float>(static_cast<std::uint32_t>(254 - bits) << 23)};
}

using Smooth = std::span<const float>;

void by_row(const Range& range, ConstTensor row, Smooth smooth, std::byte* values, std::byte* scale) {
  const std::int64_t width = row.elements();
  std::uint32_t most = 0;
  for (std::int64_t first = 0; first < width; first += kPiece) {
    const Piece piece(row, smooth, first);
    most = most_of(most, piece.values(), piece.count());
  }
  const Scale s = scale_of(most, range.largest);
  store(s.scale, scale);
  for (std::int64_t first = 0; first < width; first += kPiece) {
    const Piece piece(row, smooth, first);
    scale_down(piece.values(), piece.count(), s.inverse, range, values + first);
  }
}

/// Calls each(group, values, count, out) for every `size` values of the row.
template <class Each>
void for_groups(ConstTensor row, Smooth smooth, std::int64_t size, std::byte* values, const Each& each) {
  for (std::int64_t first = 0; first < row.elements(); first += kPiece) {
    const Piece piece(row, smooth, first);
    for (std::int64_t i = 0; i < piece.count(); i += size) {
      each((first + i) / size, piece.values() + i, std::min(size, piece.count() - i), values + first + i);
    }
  }
}

constexpr std::int64_t kGroup = 128, kBlock = 32;
static_assert(kPiece % kGroup == 0 && kPiece % kBlock == 0);

}  // namespace

Quantisation checked_quantisation(std::int64_t quant_mode, DType x, std::optional<DType> y_dtype) {
  if (quant_mode < 0 || quant_mode > 4) refuse("quant_mode is " + std::to_string(quant_mode) + ", not from 0 to 4");
  if (x != DType::f32 && x != DType::bf16 && x != DType::f16) {
    refuse("x is " + std::string(name(x)) + ", not f32, bf16 or f16");
  }
  const auto mode = static_cast<QuantMode>(quant_mode);
  const bool is_float = mode == QuantMode::per_group || mode == QuantMode::mx;
  const DType usual = mode == QuantMode::none ? x : is_float ? DType::fp8_e4m3 : DType::int8;
  const DType dtype = y_dtype.value_or(usual);
  const bool is_legal =
      mode == QuantMode::none ? dtype == x : find_range(dtype) != nullptr && !(is_float && dtype == DType::int8);
  if (!is_legal) {
    refuse("y_dtype is " + std::string(name(dtype)) + ", which quant_mode " + std::to_string(quant_mode) +
           (mode == QuantMode::none ? " does not change from " + std::string(name(x))
            : is_float              ? " has not: fp8_e4m3 or fp8_e5m2"
                                    : " has not: int8, fp8_e4m3 or fp8_e5m2"));
  }
  return {.mode = mode, .dtype = dtype};
}

std::int64_t scales_of_row(const Quantisation& quantisation, std::int64_t width) {
  switch (quantisation.mode) {
    case QuantMode::none:
    case QuantMode::static_scale:
      return 0;
    case QuantMode::per_token:
      return 1;
    case QuantMode::per_group:
      return (width + kGroup - 1) / kGroup;
    case QuantMode::mx:
      break;
  }
  return round_up((width + kBlock - 1) / kBlock, 2);
}

DType scale_dtype(const Quantisation& quantisation) {
  return quantisation.mode == QuantMode::mx ? DType::fp8_e8m0 : DType::f32;
}

std::int64_t value_bytes(const Quantisation& quantisation, std::int64_t width) {
  return width * static_cast<std::int64_t>(size_of(quantisation.dtype));
}

std::int64_t scale_bytes(const Quantisation& quantisation, std::int64_t width) {
  return scales_of_row(quantisation, width) * static_cast<std::int64_t>(size_of(scale_dtype(quantisation)));
}

std::int64_t scales_at(const Quantisation& quantisation, std::int64_t width) {
  return round_up(value_bytes(quantisation, width), 32);
}

std::int64_t message_bytes(const Quantisation& quantisation, std::int64_t width) {
  return round_up(scales_at(quantisation, width) + round_up(scale_bytes(quantisation, width), 32), 512);
}

void quantise_row(const Quantisation& quantisation, ConstTensor row, Smooth smooth, std::byte* values,
                  std::byte* scales) {
  if (quantisation.mode == QuantMode::none) {
    if (row.byte_size() > 0) std::memcpy(values, row.data(), row.byte_size());
    return;
  }
  const FloatMode mode;
  const Range& range = *find_range(quantisation.dtype);
  switch (quantisation.mode) {
    case QuantMode::none:
      break;
    case QuantMode::static_scale:
      for (std::int64_t first = 0; first < row.elements(); first += kPiece) {
        Piece piece(row, smooth, first);
        piece.add(quantisation.offset, first);
        narrow(piece.values(), piece.count(), 1, range, values + first);
      }
      break;
    case QuantMode::per_token:
      by_row(range, row, smooth, values, scales);
      break;
    case QuantMode::per_group:
      for_groups(row, smooth, kGroup, values, [&](std::int64_t g, const float* v, std::int64_t count, std::byte* out) {
        const Scale s = scale_of(most_of(0, v, count), range.largest);
        store(s.scale, scales + g * static_cast<std::int64_t>(sizeof(float)));
        scale_down(v, count, s.inverse, range, out);
      });
      break;
    case QuantMode::mx:
      std::memset(scales, 0, at(scale_bytes(quantisation, row.elements())));
      for_groups(row, smooth, kBlock, values, [&](std::int64_t b, const float* v, std::int64_t count, std::byte* out) {
        const PowerOfTwo scale = power_of(most_of(0, v, count), range.exponent);
        scales[b] = static_cast<std::byte>(scale.bits);
        scale_down(v, count, scale.inverse, range, out);
      });
      break;
  }
}

}  // namespace expar::ascend
