#include "python/src/tensor.h"

#include <nanobind/stl/string.h>

#include <array>
#include <string>

#include <expar/error.h>

#include "python/src/bind.h"

namespace expar::python {
namespace {

using nb::dlpack::dtype_code;

struct Pair {
  DType dtype;
  dtype_code code;
  std::uint8_t bits;
};
constexpr Pair kPairs[] = {
    {DType::f32, dtype_code::Float, 32},
    {DType::bf16, dtype_code::Bfloat, 16},
    {DType::f16, dtype_code::Float, 16},
    {DType::int8, dtype_code::Int, 8},
    {DType::fp8_e4m3, dtype_code::Float8_E4M3FN, 8},
    {DType::fp8_e5m2, dtype_code::Float8_E5M2, 8},
    {DType::fp8_e8m0, dtype_code::Float8_E8M0FNU, 8},
    {DType::int32, dtype_code::Int, 32},
    {DType::int64, dtype_code::Int, 64},
};

[[noreturn]] void refuse(const char* what, const std::string& why) {
  throw Error(ErrorCode::bad_argument, std::string(what) + " " + why);
}

template <class Array>
DType dtype_of(const Array& array, const char* what) {
  const nb::dlpack::dtype dtype = array.dtype();
  for (const Pair& pair : kPairs) {
    if (dtype.lanes == 1 && dtype.bits == pair.bits && dtype.code == static_cast<std::uint8_t>(pair.code)) {
      return pair.dtype;
    }
  }
  std::string known;
  for (const Pair& pair : kPairs) known += (known.empty() ? "" : ", ") + std::string(name(pair.dtype));
  refuse(what, "has a dtype of " + std::to_string(dtype.bits) + " bits (DLPack code " + std::to_string(dtype.code) +
                   ") that expar does not compute with; it takes " + known);
}

template <class Array>
Shape shape_of(const Array& array, const char* what) {
  const std::size_t rank = array.ndim();
  if (rank > Shape::kMaxRank) refuse(what, "has " + std::to_string(rank) + " axes; at most 4 are taken");
  std::int64_t dense = 1;
  bool empty = false;
  for (std::size_t axis = 0; axis < rank; ++axis) empty = empty || array.shape(axis) == 0;
  for (std::size_t axis = rank; axis-- > 0;) {
    const auto extent = static_cast<std::int64_t>(array.shape(axis));
    if (!empty && extent > 1 && array.stride(axis) != dense) {
      refuse(what, "is strided: element to element along axis " + std::to_string(axis) + " is " +
                       std::to_string(array.stride(axis)) + " elements and not " + std::to_string(dense) +
                       "; pass numpy.ascontiguousarray(x) or x.contiguous()");
    }
    dense *= extent;
  }
  const auto at = [&](std::size_t axis) { return static_cast<std::int64_t>(array.shape(axis)); };
  switch (rank) {
    case 0:
      return {};
    case 1:
      return {at(0)};
    case 2:
      return {at(0), at(1)};
    case 3:
      return {at(0), at(1), at(2)};
    default:
      return {at(0), at(1), at(2), at(3)};
  }
}

template <class Array>
void require_cpu(const Array& array, const char* what) {
  if (array.device_type() == nb::device::cpu::value) return;
  refuse(what, "lies on another device than the CPU; pass x.cpu()");
}

/// A pointer for arrays without elements, whose frameworks may hand out null: to expar that is "left out".
void* nowhere() {
  alignas(64) static std::byte memory[64];
  return memory;
}

template <class View, class Pointer>
nb::object make_view(Pointer data, const ConstTensor& tensor, nb::handle owner) {
  std::array<std::size_t, Shape::kMaxRank> extents{};
  const int rank = tensor.shape().rank();
  for (int axis = 0; axis < rank; ++axis) extents[static_cast<std::size_t>(axis)] = tensor.size(axis);
  nb::dlpack::dtype dtype{};
  for (const Pair& pair : kPairs) {
    if (pair.dtype == tensor.dtype()) dtype = {static_cast<std::uint8_t>(pair.code), pair.bits, 1};
  }
  const View view(data, static_cast<std::size_t>(rank), extents.data(), owner, nullptr, dtype, nb::device::cpu::value);
  return nb::cast(view, nb::rv_policy::reference);
}

template <class T>
nb::object numbers(std::span<const T> values, nb::handle owner) {
  const std::size_t extent = values.size();
  const nb::ndarray<nb::numpy, const T> view(values.data() == nullptr ? nowhere() : values.data(), 1, &extent, owner);
  return nb::cast(view, nb::rv_policy::reference);
}

}  // namespace

ConstTensor read(const In& array, const char* what) {
  if (!array) return {};
  require_cpu(*array, what);
  const void* data = array->size() == 0 ? nowhere() : array->data();
  return ConstTensor(data, dtype_of(*array, what), shape_of(*array, what));
}

Tensor written(const Out& array, const char* what) {
  require_cpu(array, what);
  void* data = array.size() == 0 ? nowhere() : array.data();
  return Tensor(data, dtype_of(array, what), shape_of(array, what));
}

void require(const char* what, const ConstTensor& tensor, DType dtype, const Shape& shape) {
  if (tensor.dtype() == dtype && tensor.shape() == shape) return;
  refuse(what, "is " + std::string(name(tensor.dtype())) + " " + tensor.shape().str() + ", should be " +
                   std::string(name(dtype)) + " " + shape.str());
}

nb::object view(const Tensor& tensor, nb::handle owner) {
  return make_view<nb::ndarray<nb::array_api>>(tensor.data() == nullptr ? nowhere() : tensor.data(), tensor, owner);
}
nb::object view_or_none(const Tensor& tensor, nb::handle owner) {
  return tensor.absent() ? nb::none() : view(tensor, owner);
}
nb::object view(const ConstTensor& tensor, nb::handle owner) {
  return make_view<nb::ndarray<nb::array_api, nb::ro>>(tensor.data() == nullptr ? nowhere() : tensor.data(), tensor,
                                                       owner);
}
nb::object view(std::span<const std::int32_t> values, nb::handle owner) { return numbers(values, owner); }
nb::object view(std::span<const std::int64_t> values, nb::handle owner) { return numbers(values, owner); }

void bind_tensor(nb::module_& m) {
  using namespace nb::literals;
  m.def(
      "size_of", [](const std::string& dtype) { return size_of(parse_dtype(dtype)); }, "dtype"_a, R"(
Bytes of an element. The names of dtypes are "f32", "bf16", "f16", "int8", "fp8_e4m3", "fp8_e5m2", "fp8_e8m0", "int32" and
"int64". Raises BadArgument (another name, with the list).)");
}

}  // namespace expar::python
