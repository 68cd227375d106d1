// include/expar/context.h
#include <expar/context.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "python/src/bind.h"
#include "python/src/error.h"

namespace expar::python {

using namespace nb::literals;

void bind_context(nb::module_& m) {
  nb::class_<Context>(m, "Context", nb::is_weak_referenceable(), R"(
What every call needs to know about where it runs: the ranks, the kernels, the threads. Copies share them.)")
      .def(
          "__init__",
          [](Context* self, const Communicator& communicator, int threads, const std::string& backend) {
            new (self) Context(communicator, {.threads = threads, .backend = backend});
          },
          "communicator"_a, nb::kw_only(), "threads"_a = 0, "backend"_a = "cpu", Waits(), R"(
threads : worker threads of this rank; 0: the cores it may use over the ranks of this host
backend : "cpu" or "reference"
Ranks agree on the best instruction set that all of them have. Collective.
Raises Unsupported, BadArgument, NoMemory, Mismatch, Timeout, PeerLost.)")
      .def_prop_ro("communicator", &Context::communicator)
      .def_prop_ro("rank", &Context::rank)
      .def_prop_ro("size", &Context::size)
      .def_prop_ro("threads", [](const Context& c) { return c.pool().threads(); })
      .def_prop_ro("backend", [](const Context& c) { return std::string(c.kernels().name); })
      .def_prop_ro(
          "trace", [](const Context& c) { return c.trace(); }, nb::rv_policy::reference,
          nb::sig("def trace(self) -> Trace | None"), "The communicator's.")
      .def_prop_ro("isa", [](const Context& c) { return std::string(c.kernels().isa); })
      .def(
          "with_timeout", [](const Context& c, double timeout) { return c.with_timeout(seconds(timeout)); },
          "seconds"_a, "The same context with another limit on how long one call may wait.")
      .def(
          "declining",
          [](const Context& c, const nb::typed<nb::object, nb::handle>& error) {
            return c.declining(as_error(nb::object(error), c.communicator().job_rank(c.rank())));
          },
          "error"_a, nb::sig("def declining(self, error: BaseException) -> Context"), R"(
The same context for a rank that cannot take part: every rank raises ``error`` where they meet next. One that is none of
expar's is Internal to the others.)")
      .def("on", &Context::on, "group"_a, "The same kernels and threads for a group of these ranks. Not collective.")
      .def(
          "__deepcopy__", [](nb::object self, nb::handle) { return self; }, "memo"_a,
          nb::sig("def __deepcopy__(self, memo: object) -> Context"),
          "The same context: copies of a module compute among the same ranks.")
      .def("__repr__", [](const Context& c) {
        return "<expar.Context: rank " + std::to_string(c.rank()) + " of " + std::to_string(c.size()) + ", " +
               std::string(c.kernels().isa) + ", threads " + std::to_string(c.pool().threads()) + ">";
      });
}

}  // namespace expar::python
