// expar's errors as Python's, and back.
#pragma once

#include <nanobind/nanobind.h>

#include <expar/error.h>

namespace expar::python {

/// Sets Python's error: an instance of the class of `error`'s code. With the GIL.
void raise(const Error& error);
/// That instance.
nanobind::object exception_of(const Error& error);
/// What the Python exception that ended `rank` is to the others: one of expar's is itself, another is internal with its
/// name and text. With the GIL.
Error as_error(const nanobind::python_error& error, int rank);
Error as_error(const nanobind::object& exception, int rank);

void bind_error(nanobind::module_& m);

}  // namespace expar::python
