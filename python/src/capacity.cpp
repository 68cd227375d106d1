// include/expar/capacity.h
#include <expar/capacity.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "python/src/bind.h"
#include "python/src/names.h"
#include "python/src/tensor.h"

namespace expar::python {
namespace {

using namespace nb::literals;

constexpr Named<CapacityScope> kScopes[] = {{"global", CapacityScope::global}, {"per_rank", CapacityScope::per_rank}};

}  // namespace

void bind_capacity(nb::module_& m) {
  nb::class_<CapacityOptions>(m, "CapacityOptions", R"(
How many rows an expert takes, and what becomes of the others.

policy : "none", "drop_by_position", "drop_by_score", "reroute", "overflow" or "error"
scope  : "global" (of all ranks together: the result does not depend on P) or "per_rank"
factor : an expert takes ceil((T K / E) factor) rows, or
rows   : so many)")
      .def(
          "__init__",
          [](CapacityOptions* self, const std::string& policy, const std::string& scope, double factor,
             std::int64_t rows) {
            new (self) CapacityOptions{.policy = parse_capacity_policy(policy),
                                       .scope = named(kScopes, "scope", scope).value,
                                       .factor = factor,
                                       .rows = rows};
          },
          "policy"_a = "none", nb::kw_only(), "scope"_a = "global", "factor"_a = 0.0, "rows"_a = 0)
      .def_prop_ro("policy", [](const CapacityOptions& o) { return std::string(name(o.policy)); })
      .def_prop_ro("scope", [](const CapacityOptions& o) { return name_of(kScopes, o.scope); })
      .def_ro("factor", &CapacityOptions::factor)
      .def_ro("rows", &CapacityOptions::rows)
      .def(
          "validate", [](const CapacityOptions& o) { validate(o); },
          "Raises BadArgument (a policy without a bound, a bound without a policy, both bounds), naming the value.")
      .def("__copy__", [](const CapacityOptions& o) { return o; })
      .def(
          "__deepcopy__", [](const CapacityOptions& o, const nb::object&) { return o; }, "memo"_a);

  nb::class_<Capacity>(m, "Capacity", R"(
What a bound left of a choice. Counts are over all ranks, the same on each, and empty where there was no bound.)")
      .def(nb::init<>())
      .def_ro("rows", &Capacity::rows, "that an expert takes, of the scope's ranks together")
      .def_prop_ro(
          "ids", [](nb::handle self) { return view(nb::cast<const Capacity&>(self).ids, self); },
          "[T, K] int32 for make_plan; -1 where a slot was dropped or set aside")
      .def_prop_ro(
          "weights", [](nb::handle self) { return view_or_none(nb::cast<const Capacity&>(self).weights, self); },
          "[T, K] f32: the router's, 0 where ids is -1; None with \"reroute\"")
      .def_prop_ro(
          "overflow_ids",
          [](nb::handle self) { return view_or_none(nb::cast<const Capacity&>(self).overflow_ids, self); },
          "[T, K] int32: the slots set aside, -1 elsewhere; None but with \"overflow\"")
      .def_ro("chosen", &Capacity::chosen, "[E] slots that the router gave each expert")
      .def_ro("dropped", &Capacity::dropped, "[E] of those, no expert takes")
      .def_ro("rerouted", &Capacity::rerouted, "[E] of those, another expert takes")
      .def_ro("overflowed", &Capacity::overflowed, "[E] of those, are set aside");

  m.def(
      "bound_rows",
      [](const Context& c, const CapacityOptions& options, std::int64_t experts, const Out& ids, const Routing& routing,
         Capacity& capacity) {
        if (options.policy == CapacityPolicy::none) {
          return bound_rows(c, options, experts, written(ids, "ids"), routing, capacity);
        }
        collective(
            c, [&] { return std::tuple(written(ids, "ids")); },
            [&](const Context& asked, Tensor chosen) {
              bound_rows(asked, options, experts, chosen, routing, capacity);
            });
      },
      "context"_a, "options"_a, "experts"_a, "ids"_a, "routing"_a, "capacity"_a, Waits(), nb::keep_alive<6, 4>(), R"(
Bounds the rows of each expert.

experts  : E
ids      : [T, K] int32, Routing.ids
routing  : of the same tokens
capacity : written
Collective, except for policy "none". Raises BadArgument ("expert 3 is given 41 rows, its capacity is 32"), NoMemory,
Mismatch, Timeout, PeerLost, Internal: the same on every rank.)");
}

}  // namespace expar::python
