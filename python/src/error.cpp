#include "python/src/error.h"

#include <nanobind/stl/string.h>

#include <string>

#include "python/src/interrupt.h"

namespace expar::python {
namespace {

namespace nb = nanobind;

nb::object classes() { return nb::module_::import_("expar.errors"); }

}  // namespace

nb::object exception_of(const Error& error) {
  const nb::object kind = classes().attr("BY_CODE")[nb::str(std::string(name(error.code())).c_str())];
  return kind(error.message(), error.rank(), error.peer(), error.operation());
}

void raise(const Error& error) {
  if (raise_interrupt()) return;
  const nb::object exception = exception_of(error);
  PyErr_SetObject(exception.type().ptr(), exception.ptr());
}

Error as_error(const nb::python_error& error, int rank) { return as_error(nb::borrow(error.value()), rank); }

Error as_error(const nb::object& value, int rank) {
  if (!nb::isinstance(value, classes().attr("Error"))) {
    const std::string kind = nb::str(value.type().attr("__name__")).c_str();
    return {ErrorCode::internal, kind + ": " + nb::str(value).c_str(), {.rank = rank}};
  }
  ErrorCode code = ErrorCode::internal;
  const std::string wanted = nb::cast<std::string>(value.attr("code"));
  for (int c = 0; c <= static_cast<int>(ErrorCode::internal); ++c) {
    if (name(static_cast<ErrorCode>(c)) == wanted) code = static_cast<ErrorCode>(c);
  }
  return {code,
          nb::cast<std::string>(value.attr("message")),
          {nb::cast<int>(value.attr("rank")), nb::cast<int>(value.attr("peer")),
           nb::cast<std::string>(value.attr("operation"))}};
}

void bind_error(nb::module_& m) {
  m.def(
      "exit_code",
      [](const std::string& wanted) {
        for (int c = 0; c <= static_cast<int>(ErrorCode::internal); ++c) {
          const auto code = static_cast<ErrorCode>(c);
          if (name(code) == wanted) return exit_code(code);
        }
        throw Error(ErrorCode::bad_argument, "code is '" + wanted + "', which no error has");
      },
      nb::arg("code"),
      "The exit status of the ``expar`` command for Error.code: 2 for bad_argument, 4 for timeout, ...");

  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const Error& error) {
      raise(error);
    }
  });
}

}  // namespace expar::python
