// Arrays of any framework as expar's tensors, and expar's memory as arrays: by DLPack, without copies.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include <expar/tensor.h>

namespace expar::python {

namespace nb = nanobind;

/// An array that Python hands in; or none, for an argument that is left out; or why its framework does not hand it out,
/// which read() and written() say with the argument's name.
template <class A>
struct Taken {
  std::optional<A> array;
  std::string refused;

  bool absent() const { return !array && refused.empty(); }
};
using In = Taken<nb::ndarray<nb::ro>>;
using Out = Taken<nb::ndarray<>>;

/// The array as expar sees it, valid as long as the array; None is absent.
/// Throws Error: bad_argument (a tensor whose gradient PyTorch records or, to be written, is read-only; a dtype that
/// expar has not, another device than the CPU, more than four axes, strides), naming `what`.
ConstTensor read(const In& array, const char* what);
Tensor written(const Out& array, const char* what);

/// Throws Error: bad_argument ("y is f32 [3, 4], should be f32 [3, 5]").
void require(const char* what, const ConstTensor& tensor, DType dtype, const Shape& shape);

/// Memory of expar's as an array: python/expar/arrays.py says what that is.
class View : public nb::object {
  NB_OBJECT_DEFAULT(View, nb::object, "Array", PyObject_CheckBuffer)
};
template <class T>
using Integers = nb::typed<nb::object, nb::ndarray<nb::numpy, T>>;

/// Memory of `owner`, which the array keeps alive. np.asarray and torch.from_dlpack take it without a copy.
View view(const Tensor& tensor, nb::handle owner);
/// The same, or None of what is absent.
std::optional<View> view_or_none(const Tensor& tensor, nb::handle owner);
/// The same, read-only.
View view(const ConstTensor& tensor, nb::handle owner);
/// The same of whole numbers, as a NumPy array.
Integers<std::int32_t> view(std::span<const std::int32_t> values, nb::handle owner);
Integers<std::int64_t> view(std::span<const std::int64_t> values, nb::handle owner);

/// Whether PyTorch would record what becomes of this object.
bool records_gradient(nb::handle object) noexcept;
/// Why an object that could be an array is none to read, or to write; empty where it is no array at all.
std::string refusal(nb::handle object, bool to_write) noexcept;

}  // namespace expar::python

namespace nanobind::detail {

template <class A>
struct type_caster<expar::python::Taken<A>> {
  NB_TYPE_CASTER(expar::python::Taken<A>, const_name("Array"))

  bool from_python(handle source, std::uint32_t flags, cleanup_list* cleanup) noexcept {
    value = {};
    if (source.is_none()) return true;
    make_caster<A> caster;
    if (!expar::python::records_gradient(source) && caster.from_python(source, flags, cleanup)) {
      value.array = std::move(caster.value);
      return true;
    }
    value.refused = expar::python::refusal(source, std::is_same_v<A, ndarray<>>);
    return !value.refused.empty();
  }
};

}  // namespace nanobind::detail
