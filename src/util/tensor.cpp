// Element types, shapes, views and the owning array.
#include <expar/tensor.h>

#include <algorithm>
#include <cstring>
#include <new>

#include <expar/error.h>

namespace expar {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr std::int64_t kMaxElements = std::int64_t{1} << 59;  // 8 bytes each still fit in int64

struct DTypeRow {
  DType dtype;
  std::string_view name;
  std::size_t size;
};
constexpr DTypeRow kDTypes[] = {
    {DType::f32, "f32", 4},           {DType::bf16, "bf16", 2},         {DType::f16, "f16", 2},
    {DType::int8, "int8", 1},         {DType::fp8_e4m3, "fp8_e4m3", 1}, {DType::fp8_e5m2, "fp8_e5m2", 1},
    {DType::fp8_e8m0, "fp8_e8m0", 1}, {DType::int32, "int32", 4},       {DType::int64, "int64", 8},
};

const DTypeRow& row_of(DType dtype) {
  for (const DTypeRow& row : kDTypes) {
    if (row.dtype == dtype) return row;
  }
  throw Error(ErrorCode::bad_argument, "dtype " + std::to_string(static_cast<int>(dtype)) + " does not exist");
}

// Rounds the magnitude `a` (the bits of a finite f32 without its sign) to a format with fewer bits,
// to nearest even, in integers so that the caller's rounding mode and denormal flags have no say.
// An exponent beyond the narrow format's comes out as a code above its largest; the caller clamps.
std::uint32_t round_magnitude(std::uint32_t a, int mantissa_bits, int bias) {
  const int exponent = static_cast<int>(a >> 23);
  int shift = 23 - mantissa_bits;
  std::uint32_t base = a - (static_cast<std::uint32_t>(127 - bias) << 23);
  if (exponent <= 127 - bias) {  // below the smallest normal: count units of the smallest subnormal
    shift += 128 - bias - exponent;
    if (shift > 24) return 0;  // less than half a unit
    base = (a & 0x7fffffu) | 0x800000u;
  }
  return (base + (1u << (shift - 1)) - 1u + ((base >> shift) & 1u)) >> shift;
}

// The f32 of a narrow magnitude that is neither infinity nor NaN.
float widen_magnitude(std::uint32_t code, int mantissa_bits, int bias) {
  const std::uint32_t exponent = code >> mantissa_bits;
  const std::uint32_t mantissa = code & ((1u << mantissa_bits) - 1u);
  if (exponent == 0) {  // an integer times a power of two: exact
    const auto unit = static_cast<std::uint32_t>(128 - bias - mantissa_bits) << 23;
    return static_cast<float>(mantissa) * std::bit_cast<float>(unit);
  }
  const std::uint32_t wide = (exponent + static_cast<std::uint32_t>(127 - bias)) << 23;
  return std::bit_cast<float>(wide | (mantissa << (23 - mantissa_bits)));
}

float with_sign(float magnitude, bool negative) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | (negative ? 0x80000000u : 0u));
}

constexpr std::uint32_t kF32Infinity = 0x7f800000u;

void check_rows(const ConstTensor& t, std::int64_t first, std::int64_t count) {
  if (t.shape().rank() == 0) {
    throw Error(ErrorCode::bad_argument, "a scalar has no rows to take");
  }
  if (first < 0 || count < 0 || first > t.size(0) || count > t.size(0) - first) {
    throw Error(ErrorCode::bad_argument, std::to_string(count) + " rows from row " + std::to_string(first) +
                                             " do not lie inside shape " + t.shape().str());
  }
}

Shape with_rows(const Shape& s, std::int64_t count) {
  switch (s.rank()) {
    case 1:
      return {count};
    case 2:
      return {count, s[1]};
    case 3:
      return {count, s[1], s[2]};
    default:
      return {count, s[1], s[2], s[3]};
  }
}

std::size_t offset_of(const ConstTensor& t, std::int64_t first) {
  if (first == 0) return 0;
  const std::int64_t row_elements = t.elements() / t.size(0);
  return static_cast<std::size_t>(first * row_elements) * size_of(t.dtype());
}

}  // namespace

std::size_t size_of(DType dtype) { return row_of(dtype).size; }

std::string_view name(DType dtype) { return row_of(dtype).name; }

DType parse_dtype(std::string_view name) {
  std::string names;
  for (const DTypeRow& row : kDTypes) {
    if (row.name == name) return row.dtype;
    names += (names.empty() ? "" : ", ") + std::string(row.name);
  }
  throw Error(ErrorCode::bad_argument, "no dtype is called '" + std::string(name) + "'; the names are " + names);
}

f16::f16(float value) {
  const auto u = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t a = u & 0x7fffffffu;
  std::uint32_t code = 0x7c00u;
  if (a > kF32Infinity) {
    code = 0x7e00u | ((a >> 13) & 0x3ffu);
  } else if (a < kF32Infinity) {
    const std::uint32_t rounded = round_magnitude(a, 10, 15);
    code = rounded < 0x7c00u ? rounded : 0x7c00u;
  }
  bits = static_cast<std::uint16_t>(((u >> 16) & 0x8000u) | code);
}

f16::operator float() const {
  const std::uint32_t code = bits & 0x7fffu;
  const float magnitude =
      code >= 0x7c00u ? std::bit_cast<float>(kF32Infinity | ((code & 0x3ffu) << 13)) : widen_magnitude(code, 10, 15);
  return with_sign(magnitude, (bits & 0x8000u) != 0);
}

fp8_e4m3::fp8_e4m3(float value) {
  const auto u = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t a = u & 0x7fffffffu;
  std::uint32_t code = 0x7eu;  // 448
  if (a > kF32Infinity) {
    code = 0x7fu;
  } else if (a < kF32Infinity) {
    const std::uint32_t rounded = round_magnitude(a, 3, 7);
    code = rounded < 0x7eu ? rounded : 0x7eu;
  }
  bits = static_cast<std::uint8_t>(((u >> 24) & 0x80u) | code);
}

fp8_e4m3::operator float() const {
  const std::uint32_t code = bits & 0x7fu;
  const float magnitude = code == 0x7fu ? std::bit_cast<float>(0x7fc00000u) : widen_magnitude(code, 3, 7);
  return with_sign(magnitude, (bits & 0x80u) != 0);
}

fp8_e5m2::fp8_e5m2(float value) {
  const auto u = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t a = u & 0x7fffffffu;
  std::uint32_t code = 0x7cu;
  if (a > kF32Infinity) {
    code = 0x7eu | ((a >> 21) & 0x3u);
  } else if (a < kF32Infinity) {
    code = std::min(round_magnitude(a, 2, 15), 0x7cu);
  }
  bits = static_cast<std::uint8_t>(((u >> 24) & 0x80u) | code);
}

fp8_e5m2::operator float() const {
  const std::uint32_t code = bits & 0x7fu;
  const float magnitude =
      code >= 0x7cu ? std::bit_cast<float>(kF32Infinity | ((code & 0x3u) << 21)) : widen_magnitude(code, 2, 15);
  return with_sign(magnitude, (bits & 0x80u) != 0);
}

fp8_e8m0::operator float() const {
  if (bits == 0xffu) return std::bit_cast<float>(0x7fc00000u);
  return std::bit_cast<float>(bits == 0 ? 0x00400000u : std::uint32_t{bits} << 23);
}

Shape::Shape(std::initializer_list<std::int64_t> extents) {
  if (extents.size() > static_cast<std::size_t>(kMaxRank)) {
    throw Error(ErrorCode::bad_argument,
                "a shape has at most " + std::to_string(kMaxRank) + " extents, not " + std::to_string(extents.size()));
  }
  std::int64_t total = 1;
  bool too_large = false;
  for (const std::int64_t extent : extents) {
    if (extent < 0) {
      throw Error(ErrorCode::bad_argument, "extent " + std::to_string(rank_) + " of a shape is " +
                                               std::to_string(extent) + "; it must not be negative");
    }
    // Zero elsewhere does not excuse an absurd extent: the product of the others must stay
    // addressable too.
    too_large = too_large || __builtin_mul_overflow(total, extent > 0 ? extent : 1, &total) || total > kMaxElements;
    extents_[static_cast<std::size_t>(rank_++)] = extent;
  }
  if (too_large) {
    throw Error(ErrorCode::bad_argument, "shape " + str() + " has more elements than memory can hold");
  }
}

std::int64_t Shape::elements() const {
  std::int64_t total = 1;
  for (int axis = 0; axis < rank_; ++axis) total *= (*this)[axis];
  return total;
}

std::string Shape::str() const {
  std::string text = "[";
  for (int axis = 0; axis < rank_; ++axis) {
    if (axis > 0) text += ", ";
    text += std::to_string((*this)[axis]);
  }
  return text + "]";
}

void ConstTensor::require(DType wanted) const {
  if (wanted == dtype_) return;
  throw Error(ErrorCode::bad_argument, "a tensor of dtype " + std::string(name(dtype_)) + " and shape " + shape_.str() +
                                           " was read as " + std::string(name(wanted)));
}

ConstTensor ConstTensor::rows(std::int64_t first, std::int64_t count) const {
  check_rows(*this, first, count);
  return ConstTensor(bytes() + offset_of(*this, first), dtype_, with_rows(shape_, count), device_);
}

Tensor Tensor::rows(std::int64_t first, std::int64_t count) const {
  check_rows(*this, first, count);
  return Tensor(bytes() + offset_of(*this, first), dtype_, with_rows(shape_, count), device_);
}

Array::Array(DType dtype, Shape shape) {
  const std::size_t bytes = static_cast<std::size_t>(shape.elements()) * size_of(dtype);
  // One byte at least, so that an array of no elements still is an array.
  void* memory = ::operator new(bytes > 0 ? bytes : 1, kAlignment, std::nothrow);
  if (memory == nullptr) {
    throw Error(ErrorCode::no_memory, "no memory for " + std::to_string(bytes) + " bytes (" + std::string(name(dtype)) +
                                          " " + shape.str() + ")");
  }
  memory_.reset(static_cast<std::byte*>(memory));
  std::memset(memory, 0, bytes);
  view_ = Tensor(memory, dtype, shape);
}

void Array::Free::operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }

Tensor Buffer::view(DType dtype, Shape shape) {
  const std::size_t bytes = static_cast<std::size_t>(shape.elements()) * size_of(dtype);
  const std::size_t have = memory_.view().absent() ? 0 : memory_.view().byte_size();
  if (!memory_ || bytes > have) {
    // Half as much again, so that sizes which creep upwards from call to call soon stop allocating.
    const std::size_t room = have == 0 ? bytes : std::max(bytes, have + have / 2);
    memory_ = {};
    memory_ = Array(DType::int8, {static_cast<std::int64_t>(room)});
  }
  return {memory_.view().data(), dtype, shape};
}

}  // namespace expar
