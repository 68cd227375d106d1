// Views of memory that somebody else owns, the element types they hold, and one owner for the rest.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>

namespace expar {

enum class DType : std::uint8_t { f32, bf16, f16, int8, fp8_e4m3, fp8_e5m2, fp8_e8m0, int32, int64 };

/// Throw Error: bad_argument (a number that is none of these).
std::size_t size_of(DType dtype);
std::string_view name(DType dtype);
/// Throws Error: bad_argument (not one of the names above, with the list of them).
DType parse_dtype(std::string_view name);

/// The upper half of an f32. Conversion rounds to nearest even; NaN stays NaN.
struct bf16 {
  std::uint16_t bits = 0;

  bf16() = default;
  explicit bf16(float value) : bits(round(value)) {}
  explicit operator float() const { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

 private:
  static std::uint16_t round(float value) {
    const auto u = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
  }
};

/// IEEE binary16. Conversion rounds to nearest even; overflow gives infinity; NaN stays NaN.
struct f16 {
  std::uint16_t bits = 0;

  f16() = default;
  explicit f16(float value);
  explicit operator float() const;
};

/// FP8 with 4 exponent and 3 mantissa bits, no infinity, largest value 448 (OCP E4M3).
struct fp8_e4m3 {
  std::uint8_t bits = 0;

  fp8_e4m3() = default;
  /// Rounds to nearest even; beyond 448 gives 448 with the sign kept; NaN stays NaN.
  explicit fp8_e4m3(float value);
  explicit operator float() const;
};

/// FP8 with 5 exponent and 2 mantissa bits (OCP E5M2).
struct fp8_e5m2 {
  std::uint8_t bits = 0;

  fp8_e5m2() = default;
  /// Rounds to nearest even; overflow gives infinity; NaN stays NaN.
  explicit fp8_e5m2(float value);
  explicit operator float() const;
};

/// A scale: 2^(bits - 127), NaN where all bits are set (OCP MX E8M0). The least, 2^-127, is subnormal as an f32.
struct fp8_e8m0 {
  std::uint8_t bits = 0;

  fp8_e8m0() = default;
  explicit operator float() const;
};

template <class T>
inline constexpr bool kIsElement = false;
template <class T>
inline constexpr DType kDTypeOf = DType::f32;
#define EXPAR_ELEMENT(type, dtype)               \
  template <>                                    \
  inline constexpr bool kIsElement<type> = true; \
  template <>                                    \
  inline constexpr DType kDTypeOf<type> = DType::dtype;
EXPAR_ELEMENT(float, f32)
EXPAR_ELEMENT(bf16, bf16)
EXPAR_ELEMENT(f16, f16)
EXPAR_ELEMENT(std::int8_t, int8)
EXPAR_ELEMENT(fp8_e4m3, fp8_e4m3)
EXPAR_ELEMENT(fp8_e5m2, fp8_e5m2)
EXPAR_ELEMENT(fp8_e8m0, fp8_e8m0)
EXPAR_ELEMENT(std::int32_t, int32)
EXPAR_ELEMENT(std::int64_t, int64)
#undef EXPAR_ELEMENT

/// Where memory lives. Only the CPU has kernels today; the field is here so that no signature changes for a GPU.
struct Device {
  enum class Kind : std::uint8_t { cpu, cuda };
  Kind kind = Kind::cpu;
  int index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

/// Up to four extents, outermost first. An empty shape is a scalar.
class Shape {
 public:
  static constexpr int kMaxRank = 4;

  Shape() = default;
  /// Throws Error: bad_argument (more than four, one below 0, or more elements than memory can hold).
  Shape(std::initializer_list<std::int64_t> extents);

  int rank() const { return rank_; }
  std::int64_t operator[](int axis) const { return extents_[static_cast<std::size_t>(axis)]; }
  std::int64_t elements() const;
  std::string str() const;  // "[17, 64]"
  friend bool operator==(const Shape&, const Shape&) = default;

 private:
  int rank_ = 0;
  std::array<std::int64_t, kMaxRank> extents_{};
};

/// A read-only view of a dense row-major array. Copies are cheap; the memory must outlive them.
class ConstTensor {
 public:
  ConstTensor() = default;
  ConstTensor(const void* data, DType dtype, Shape shape, Device device = {})
      : data_(data), dtype_(dtype), device_(device), shape_(shape) {}
  template <class T>
  requires kIsElement<T> ConstTensor(const T* data, Shape shape) : ConstTensor(data, kDTypeOf<T>, shape) {}

  const void* data() const { return data_; }
  const std::byte* bytes() const { return static_cast<const std::byte*>(data_); }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  const Shape& shape() const { return shape_; }
  std::int64_t size(int axis) const { return shape_[axis]; }
  std::int64_t elements() const { return shape_.elements(); }
  std::size_t byte_size() const { return static_cast<std::size_t>(elements()) * size_of(dtype_); }
  /// True for a view of nothing, the way to leave out an optional argument.
  bool absent() const { return data_ == nullptr && elements() <= 1 && shape_.rank() == 0; }

  /// The elements as T. Throws Error: bad_argument (T is not the dtype).
  template <class T>
  const T* as() const {
    require(kDTypeOf<T>);
    return static_cast<const T*>(data_);
  }
  /// Rows [first, first + count) of the outermost axis. Throws Error: bad_argument (a scalar; rows beyond the last).
  ConstTensor rows(std::int64_t first, std::int64_t count) const;

 protected:
  void require(DType wanted) const;

  const void* data_ = nullptr;
  DType dtype_ = DType::f32;
  Device device_;
  Shape shape_;
};

/// The same, writable.
class Tensor : public ConstTensor {
 public:
  Tensor() = default;
  Tensor(void* data, DType dtype, Shape shape, Device device = {}) : ConstTensor(data, dtype, shape, device) {}
  template <class T>
  requires kIsElement<T> Tensor(T* data, Shape shape) : ConstTensor(data, kDTypeOf<T>, shape) {}

  void* data() const { return const_cast<void*>(data_); }
  std::byte* bytes() const { return static_cast<std::byte*>(data()); }
  template <class T>
  T* as() const {
    require(kDTypeOf<T>);
    return static_cast<T*>(data());
  }
  Tensor rows(std::int64_t first, std::int64_t count) const;
};

/// A tensor that owns its memory: 64-byte aligned, zeroed, released by the destructor. Move-only.
/// Throws Error: no_memory (with the size that was asked for).
class Array {
 public:
  Array() = default;
  Array(DType dtype, Shape shape);

  Tensor view() const { return view_; }
  operator Tensor() const { return view_; }
  operator ConstTensor() const { return view_; }
  template <class T>
  T* as() const {
    return view_.as<T>();
  }
  explicit operator bool() const { return memory_ != nullptr; }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte, Free> memory_;
  Tensor view_;
};

/// Memory that is used again and again: view() grows it when it must and never shrinks it. Contents do not survive.
class Buffer {
 public:
  /// Valid until the next call. Throws Error: no_memory.
  Tensor view(DType dtype, Shape shape);

 private:
  Array memory_;
};

}  // namespace expar
