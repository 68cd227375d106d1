#include "python/src/interrupt.h"

#include <nanobind/nanobind.h>

#include <optional>
#include <utility>

namespace expar::python {
namespace {

namespace nb = nanobind;

/// What a signal handler raised while this thread waited, until the wait has unwound.
thread_local std::optional<nb::python_error> raised;

/// Without the GIL. Handlers run in the main thread alone.
bool handler_raised() {
  const nb::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return false;
  raised.emplace();
  return true;
}

}  // namespace

void make_interruptible(const Communicator& communicator, std::shared_ptr<const std::atomic<bool>> stop) {
  communicator.interrupt_by([stop = std::move(stop)] { return (stop && *stop) || handler_raised(); });
}

bool raise_interrupt() {
  if (!raised) return false;
  raised->restore();
  raised.reset();
  return true;
}

}  // namespace expar::python
