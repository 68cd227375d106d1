// include/expar/registry.h: launch() and report_error(), for programs that start ranks.
#include <pthread.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <csignal>
#include <exception>
#include <future>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <expar/registry.h>

#include "python/src/bind.h"
#include "python/src/error.h"

namespace expar::python {
namespace {

using namespace nb::literals;

/// On a thread of its own, so that Python's signal handlers run meanwhile; Ctrl-C goes on to the ranks.
void run_launch(int ranks, const std::vector<std::string>& command) {
  std::promise<std::optional<Error>> promise;
  std::future<std::optional<Error>> outcome = promise.get_future();
  std::thread launcher([&] {
    try {
      promise.set_value(launch(ranks, command));
    } catch (...) {
      promise.set_exception(std::current_exception());
    }
  });
  const auto ended = [&] {
    const nb::gil_scoped_release no_gil;
    return outcome.wait_for(std::chrono::milliseconds(50)) == std::future_status::ready;
  };
  std::optional<nb::python_error> interrupt;
  while (!ended()) {
    if (PyErr_CheckSignals() == 0) continue;
    interrupt.emplace();
    pthread_kill(launcher.native_handle(), SIGINT);
  }
  {
    const nb::gil_scoped_release no_gil;
    launcher.join();
  }
  // The launcher puts back what it has taken of the signal, which may be all of it.
  if (PyErr_CheckSignals() != 0) {
    if (interrupt) PyErr_Clear();
    if (!interrupt) interrupt.emplace();
  }
  if (interrupt) throw *interrupt;
  if (const std::optional<Error> error = outcome.get()) throw *error;
}

}  // namespace

void bind_launch(nb::module_& m) {
  m.def("launch", &run_launch, "ranks"_a, "command"_a, R"(
Starts ``ranks`` processes of ``command`` on this host in rank order, waits for them, and leaves none behind.

command : ["python", "train.py", ...]; the processes join each other by init()
Raises the root cause if any failed (one that was killed: PeerLost, naming it); BadArgument (no ranks, no program),
IoError. Ctrl-C goes to the processes, and is raised here when none is left.)");
  m.def(
      "report_error",
      [](const nb::object& error) {
        if (!PyExceptionInstance_Check(error.ptr())) throw nb::type_error("error should be an exception");
        report_error(as_error(error, job_from_environment().rank));
      },
      "error"_a, nb::sig("def report_error(error: BaseException) -> None"), R"(
In a process that launch() or ``expar launch`` has started: hands the exception that ends this rank to the launcher,
which names it where the process alone would say "exited with 1". Elsewhere: does nothing.)");
}

}  // namespace expar::python
