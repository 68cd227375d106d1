// include/expar/trace.h
#include <expar/trace.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "python/src/bind.h"
#include "python/src/names.h"

namespace expar::python {
namespace {

using namespace nb::literals;

constexpr Named<Span::Kind> kKinds[] = {
    {"phase", Span::Kind::phase}, {"operation", Span::Kind::operation}, {"wait", Span::Kind::wait}};

/// A span with words of its own; times in nanoseconds.
struct OwnSpan {
  std::string name, kind, what;
  int peer = -1;
  std::int64_t start = 0, end = 0;

  friend bool operator==(const OwnSpan&, const OwnSpan&) = default;
};
using SpanState = std::tuple<std::string, std::string, std::string, int, std::int64_t, std::int64_t>;

std::int64_t nanoseconds(Span::Time time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}
Span::Time time_of(std::int64_t ns) { return Span::Time(std::chrono::nanoseconds(ns)); }

OwnSpan own(const Span& s) {
  return {std::string(s.name),  name_of(kKinds, s.kind), std::string(s.what), s.peer,
          nanoseconds(s.start), nanoseconds(s.end)};
}
Span lent(const OwnSpan& s) {
  return {.kind = named(kKinds, "kind", s.kind).value,
          .name = s.name,
          .what = s.what,
          .peer = s.peer,
          .start = time_of(s.start),
          .end = time_of(s.end)};
}

/// Phase as a context manager.
struct PhaseHere {
  std::shared_ptr<Trace> trace;
  std::string name;
  std::optional<Phase> phase = {};
};

void bind_span(nb::module_& m) {
  nb::class_<OwnSpan>(m, "Span", "A stretch of one rank's time. The spans of a rank lie beside or within each other.")
      .def(
          "__init__",
          [](OwnSpan* self, const std::string& name, std::int64_t start, std::int64_t end, const std::string& kind,
             const std::string& what, int peer) {
            new (self) OwnSpan{name, std::string(named(kKinds, "kind", kind).name), what, peer, start, end};
          },
          "name"_a, "start"_a, "end"_a, nb::kw_only(), "kind"_a = "phase", "what"_a = "", "peer"_a = -1)
      .def_ro("name", &OwnSpan::name, "of a wait: the operation that waits")
      .def_ro("kind", &OwnSpan::kind, "\"phase\", \"operation\" (of a collective) or \"wait\" (for others, within one)")
      .def_ro("what", &OwnSpan::what, "of a wait: for what")
      .def_ro("peer", &OwnSpan::peer, "of a wait: for which rank; -1 when it is not one")
      .def_ro("start", &OwnSpan::start, "nanoseconds of time.monotonic_ns(), which all ranks of a host share")
      .def_ro("end", &OwnSpan::end)
      .def(
          "__eq__", [](const OwnSpan& a, const OwnSpan& b) { return a == b; }, nb::is_operator(),
          nb::sig("def __eq__(self, other: object, /) -> bool"))
      .def("__getstate__", [](const OwnSpan& s) { return SpanState(s.name, s.kind, s.what, s.peer, s.start, s.end); })
      .def("__setstate__",
           [](OwnSpan& s, const SpanState& state) {
             const auto& [name, kind, what, peer, start, end] = state;
             new (&s) OwnSpan{name, kind, what, peer, start, end};
           })
      .def("__repr__", [](const OwnSpan& s) {
        return "<expar.Span: " + s.kind + " " + s.name + ", " + std::to_string(s.end - s.start) + " ns>";
      });
}

}  // namespace

void bind_trace(nb::module_& m) {
  bind_span(m);
  nb::class_<Trace>(m, "Trace", R"(
What one rank did, and when: spans in the order of their ends, kept in memory. ``communicator.record(trace)`` fills it;
write_trace() makes a file of it. One thread at a time uses it. Cost: 72 bytes per span.)")
      .def(nb::init<std::size_t>(), "capacity"_a = Trace::kCapacity,
           "Spans beyond the capacity are only counted, in ``left_out``.")
      .def(
          "add", [](Trace& t, const OwnSpan& span) { t.add(lent(span)); }, "span"_a)
      .def_prop_ro(
          "spans",
          [](const Trace& t) {
            std::vector<OwnSpan> all;
            for (const Span& span : t.spans()) all.push_back(own(span));
            return all;
          },
          "[Span] so far, copies")
      .def_prop_ro("left_out", &Trace::left_out);

  nb::class_<PhaseHere>(m, "Phase", R"(
``with Phase(trace, "forward"): ...`` adds a span for what happens within, exceptions included. trace None: nothing.)")
      .def(
          "__init__",
          [](PhaseHere* self, std::shared_ptr<Trace> trace, const std::string& name) {
            new (self) PhaseHere{std::move(trace), name};
          },
          "trace"_a.none(), "name"_a)
      .def("__enter__", [](PhaseHere& p) { p.phase.emplace(p.trace.get(), p.name); })
      .def(
          "__exit__", [](PhaseHere& p, const nb::args&) { p.phase.reset(); },
          nb::sig("def __exit__(self, *exception: object) -> None"));
}

}  // namespace expar::python
