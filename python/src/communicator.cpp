// include/expar/communicator.h
#include <expar/communicator.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "python/src/bind.h"

namespace expar::python {

using namespace nb::literals;

void bind_communicator(nb::module_& m) {
  m.def(
      "default_timeout", [] { return in_seconds(default_timeout()); },
      "Seconds that a call may wait where nobody says otherwise: EXPAR_TIMEOUT, else 120.");

  nb::class_<Communicator>(m, "Communicator", nb::is_weak_referenceable(), R"(
A set of ranks that work together. Copies are the same communicator; one thread at a time uses it.

After Timeout or PeerLost, and after abort(), every later call raises the same error.)")
      .def_prop_ro("rank", &Communicator::rank)
      .def_prop_ro("size", &Communicator::size)
      .def_prop_ro("transport_name", [](const Communicator& c) { return std::string(c.transport_name()); })
      .def_prop_ro(
          "timeout", [](const Communicator& c) { return in_seconds(c.timeout()); }, "Seconds.")
      .def("job_rank", &Communicator::job_rank, "rank"_a,
           "The rank of the whole job that is ``rank`` here, which is what errors name.")
      .def(
          "with_timeout", [](const Communicator& c, double timeout) { return c.with_timeout(seconds(timeout)); },
          "seconds"_a, "The same communicator with another limit on how long one call may wait.")
      .def(
          "split",
          [](const Communicator& c, int group, int key) -> std::optional<Communicator> {
            Communicator part = c.split(group, key);
            if (!part) return std::nullopt;
            return part;
          },
          "group"_a, "key"_a = 0, Waits(), R"(
The ranks that name the same ``group`` become a communicator of their own, ordered by ``key``, then by rank; -1 joins
none and gets None.

Collective. A rank is in at most 15 groups. Raises BadArgument, Mismatch, Timeout, PeerLost.)")
      .def(
          "abort", [](const Communicator& c, const std::string& message) { c.abort(message); }, "message"_a,
          "Ends the job: every rank's next or current call raises Internal with this message. Not collective.")
      .def("record", &Communicator::record, "trace"_a.none(), R"(
From here on what this rank does and waits for becomes spans of ``trace``, in all communicators of the job; None ends it.
Not collective.)")
      .def_prop_ro(
          "trace", [](const Communicator& c) { return c.trace(); }, nb::rv_policy::reference,
          nb::sig("def trace(self) -> Trace | None"), "None where nothing is recorded.")
      .def_prop_ro("arena_bytes", &Communicator::arena_bytes,
                   "Bytes that peers can address which this rank has taken from the system so far.")
      .def("__repr__", [](const Communicator& c) {
        return "<expar.Communicator: rank " + std::to_string(c.rank()) + " of " + std::to_string(c.size()) + ", " +
               std::string(c.transport_name()) + ">";
      });
}

}  // namespace expar::python
