// Arrays of any framework as expar's tensors, and expar's memory as arrays: by DLPack, without copies.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <span>

#include <expar/tensor.h>

namespace expar::python {

namespace nb = nanobind;

/// An array that is read, or None for an argument that is left out.
using In = std::optional<nb::ndarray<nb::ro>>;
/// An array that is written.
using Out = nb::ndarray<>;

/// The array as expar sees it, valid as long as the array; None is absent.
/// Throws Error: bad_argument (a dtype that expar has not, another device than the CPU, more than four axes, strides),
/// naming `what`.
ConstTensor read(const In& array, const char* what);
Tensor written(const Out& array, const char* what);

/// Throws Error: bad_argument ("y is f32 [3, 4], should be f32 [3, 5]").
void require(const char* what, const ConstTensor& tensor, DType dtype, const Shape& shape);

/// Memory of `owner`, which the array keeps alive. np.asarray and torch.from_dlpack take it without a copy.
nb::object view(const Tensor& tensor, nb::handle owner);
/// The same, or None of what is absent.
nb::object view_or_none(const Tensor& tensor, nb::handle owner);
/// The same, read-only.
nb::object view(const ConstTensor& tensor, nb::handle owner);
/// The same of whole numbers, as a NumPy array.
nb::object view(std::span<const std::int32_t> values, nb::handle owner);
nb::object view(std::span<const std::int64_t> values, nb::handle owner);

}  // namespace expar::python
