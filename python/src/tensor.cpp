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

template <class Viewed, class Pointer>
View make_view(Pointer data, const ConstTensor& tensor, nb::handle owner) {
  std::array<std::size_t, Shape::kMaxRank> extents{};
  const int rank = tensor.shape().rank();
  for (int axis = 0; axis < rank; ++axis) extents[static_cast<std::size_t>(axis)] = tensor.size(axis);
  nb::dlpack::dtype dtype{};
  for (const Pair& pair : kPairs) {
    if (pair.dtype == tensor.dtype()) dtype = {static_cast<std::uint8_t>(pair.code), pair.bits, 1};
  }
  const Viewed viewed(data, static_cast<std::size_t>(rank), extents.data(), owner, nullptr, dtype,
                      nb::device::cpu::value);
  return nb::steal<View>(nb::cast(viewed, nb::rv_policy::reference).release());
}

template <class T>
Integers<T> numbers(std::span<const T> values, nb::handle owner) {
  const std::size_t extent = values.size();
  const nb::ndarray<nb::numpy, const T> view(values.data() == nullptr ? nowhere() : values.data(), 1, &extent, owner);
  return Integers<T>(nb::cast(view, nb::rv_policy::reference));
}

}  // namespace

ConstTensor read(const In& in, const char* what) {
  if (!in.refused.empty()) refuse(what, in.refused);
  if (!in.array) return {};
  require_cpu(*in.array, what);
  const void* data = in.array->size() == 0 ? nowhere() : in.array->data();
  return ConstTensor(data, dtype_of(*in.array, what), shape_of(*in.array, what));
}

Tensor written(const Out& out, const char* what) {
  if (!out.refused.empty()) refuse(what, out.refused);
  if (!out.array) return {};
  require_cpu(*out.array, what);
  void* data = out.array->size() == 0 ? nowhere() : out.array->data();
  return Tensor(data, dtype_of(*out.array, what), shape_of(*out.array, what));
}

bool records_gradient(nb::handle object) noexcept {
  PyObject* const requires_grad = PyObject_GetAttrString(object.ptr(), "requires_grad");
  if (requires_grad == nullptr) PyErr_Clear();
  const bool wanted = requires_grad == Py_True;
  Py_XDECREF(requires_grad);
  if (!wanted) return false;
  try {
    return nb::cast<bool>(nb::module_::import_("torch").attr("is_grad_enabled")());
  } catch (const std::exception&) {
    return true;
  }
}

std::string refusal(nb::handle object, bool to_write) noexcept {
  try {
    if (!nb::hasattr(object, "__dlpack__")) return {};
    if (records_gradient(object)) {
      return "requires a gradient, which is lost here; pass x.detach(), or call what expar.torch has";
    }
    nb::ndarray<nb::ro> readable;
    if (to_write && nb::try_cast(object, readable)) return "is read-only and would be written; pass a copy";
    object.attr("__dlpack__")();
  } catch (const nb::python_error& error) {
    return std::string("is not handed out by its framework: ") + nb::str(nb::borrow(error.value())).c_str();
  } catch (const std::exception&) {
  }
  return {};
}

void require(const char* what, const ConstTensor& tensor, DType dtype, const Shape& shape) {
  if (tensor.dtype() == dtype && tensor.shape() == shape) return;
  refuse(what, "is " + std::string(name(tensor.dtype())) + " " + tensor.shape().str() + ", should be " +
                   std::string(name(dtype)) + " " + shape.str());
}

View view(const Tensor& tensor, nb::handle owner) {
  return make_view<nb::ndarray<nb::array_api>>(tensor.data() == nullptr ? nowhere() : tensor.data(), tensor, owner);
}
std::optional<View> view_or_none(const Tensor& tensor, nb::handle owner) {
  if (tensor.absent()) return std::nullopt;
  return view(tensor, owner);
}
View view(const ConstTensor& tensor, nb::handle owner) {
  return make_view<nb::ndarray<nb::array_api, nb::ro>>(tensor.data() == nullptr ? nowhere() : tensor.data(), tensor,
                                                       owner);
}
Integers<std::int32_t> view(std::span<const std::int32_t> values, nb::handle owner) { return numbers(values, owner); }
Integers<std::int64_t> view(std::span<const std::int64_t> values, nb::handle owner) { return numbers(values, owner); }

void bind_tensor(nb::module_& m) {
  using namespace nb::literals;
  m.def(
      "size_of", [](const std::string& dtype) { return size_of(parse_dtype(dtype)); }, "dtype"_a, R"(
Bytes of an element. The names of dtypes are "f32", "bf16", "f16", "int8", "fp8_e4m3", "fp8_e5m2", "fp8_e8m0", "int32" and
"int64". Raises BadArgument (another name, with the list).)");
}

}  // namespace expar::python
