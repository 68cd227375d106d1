// include/expar/plan.h
#include <expar/plan.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <utility>
#include <vector>

#include "python/src/bind.h"
#include "python/src/tensor.h"

namespace expar::python {
namespace {

using namespace nb::literals;
using FirstExperts = std::vector<std::int64_t>;

template <auto accessor>
auto numbers(nb::handle self) {
  return view((nb::cast<const Plan&>(self).*accessor)(), self);
}

PlanOptions options(std::int64_t experts, const FirstExperts& first_experts, std::int64_t alignment) {
  return {.experts = experts, .first_experts = first_experts, .alignment = alignment};
}

std::pair<std::int64_t, std::int64_t> as_tuple(const ExpertRange& range) { return {range.first, range.count}; }

}  // namespace

void bind_plan(nb::module_& m) {
  m.def(
      "experts_of",
      [](int rank, int ranks, std::int64_t experts) { return as_tuple(experts_of(rank, ranks, experts)); }, "rank"_a,
      "ranks"_a, "experts"_a, R"(
(first, count) of the experts of a rank where nothing else is said: floor(r E / P) ... floor((r + 1) E / P) - 1.)");
  m.def("owner_of", &owner_of, "expert"_a, "ranks"_a, "experts"_a, "The rank that holds ``expert`` there.");

  nb::class_<Plan>(m, "Plan", R"(
Who sends which row where: made once from the router's choice, used by dispatch, combine and both their gradients.

The rows of an expert stand in (source rank, token, slot) order: the global token order, whatever P is. Arrays are views
of the plan's memory. A bounded plan is open at first; the inbox of its dispatch has the complete one.)")
      .def_prop_ro("tokens", &Plan::tokens, "T")
      .def_prop_ro("topk", &Plan::topk, "K")
      .def_prop_ro("experts", &Plan::experts, "E")
      .def_prop_ro("open", &Plan::open)
      .def_prop_ro(
          "local", [](const Plan& p) { return as_tuple(p.local()); }, "(first, count) of this rank's experts")
      .def(
          "held_by", [](const Plan& p, int rank) { return as_tuple(p.held_by(rank)); }, "rank"_a)
      .def_prop_ro("counts", &numbers<&Plan::counts>, "[P, E] int32, flat: rows that each rank has for each expert")
      .def_prop_ro("expert_totals", &numbers<&Plan::expert_totals>, "[E] int64 rows of each expert over all ranks")
      .def_prop_ro("offsets", &numbers<&Plan::offsets>,
                   "[L + 1] int64 first row of each local expert in the outbox; the last is R")
      .def_prop_ro("rows", &numbers<&Plan::rows>, "[L] int64 rows of each local expert")
      .def_prop_ro("received", &Plan::received, "R, the (token, slot) rows that this rank's experts take")
      .def_prop_ro("sources", &numbers<&Plan::sources>, "[P + 1] int64 first inbox row of each source; the last is U")
      .def_prop_ro("unique", &Plan::unique, "U, the rows that come from other ranks")
      .def_prop_ro("ids", &numbers<&Plan::ids>, "[T K] int32, flat")
      .def(
          "sent_bytes",
          [](const Plan& p, std::int64_t width, const std::string& dtype) {
            return p.sent_bytes(width, parse_dtype(dtype));
          },
          "width"_a, "dtype"_a = "f32",
          "Bytes of the rows of ``width`` elements that this rank writes to other ranks in a dispatch.");

  nb::class_<PendingPlan>(m, "PendingPlan", "A plan whose counts are on their way.")
      .def("finish", &PendingPlan::finish, Waits(), "Waits for the counts of all ranks and returns the Plan.");

  m.def(
      "make_plan",
      [](const Context& c, const In& ids, std::int64_t experts, const FirstExperts& first, std::int64_t alignment) {
        return collective(
            c, [&] { return std::tuple(read(ids, "ids")); },
            [&](const Context& asked, ConstTensor chosen) {
              return make_plan(asked, chosen, options(experts, first, alignment));
            });
      },
      "context"_a, "ids"_a, "experts"_a, nb::kw_only(), "first_experts"_a = FirstExperts(), "alignment"_a = 1, Waits(),
      R"(
Counts this rank's rows, exchanges the counts, and works out every offset.

ids           : [T, K] int32 in [-1, E); -1 is not routed; the same expert twice in one token is two rows. T may differ
                per rank.
experts       : E
first_experts : [P + 1] where each rank's experts begin, from 0 to E; empty: as experts_of
alignment     : each expert's rows begin at a multiple of it, for kernels of the caller's own
Collective: K, E, first_experts and the alignment are the same on all ranks.
Raises BadArgument ("ids[17,2] = 64 is not below num_experts 64"), Mismatch, NoMemory, Timeout, PeerLost: the same on
every rank. Cost: one exchange of P x (E + P) integers.)");
  m.def(
      "start_plan",
      [](const Context& c, const In& ids, std::int64_t experts, const FirstExperts& first, std::int64_t alignment) {
        return collective(
            c, [&] { return std::tuple(read(ids, "ids")); },
            [&](const Context& asked, ConstTensor chosen) {
              return start_plan(asked, chosen, options(experts, first, alignment));
            });
      },
      "context"_a, "ids"_a, "experts"_a, nb::kw_only(), "first_experts"_a = FirstExperts(), "alignment"_a = 1, Waits(),
      nb::keep_alive<0, 2>(), "make_plan in two phases: returns at once; PendingPlan.finish() waits.");
  m.def(
      "make_bounded_plan",
      [](const Context& c, const In& ids, std::int64_t bound, std::int64_t experts, const FirstExperts& first,
         std::int64_t alignment) {
        return make_bounded_plan(c, read(ids, "ids"), bound, options(experts, first, alignment));
      },
      "context"_a, "ids"_a, "bound"_a, "experts"_a, nb::kw_only(), "first_experts"_a = FirstExperts(),
      "alignment"_a = 1, Waits(), R"(
For decoding, where waiting costs more than bytes: counts travel with the rows, in room for ``bound`` tokens of each
rank. Not collective; what is wrong with the ids is an error that dispatch raises on every rank.)");
  m.def(
      "make_replicated_plan",
      [](const Context& c, const In& ids, std::int64_t experts, const FirstExperts& first, std::int64_t alignment) {
        return make_replicated_plan(c, read(ids, "ids"), options(experts, first, alignment));
      },
      "context"_a, "ids"_a, "experts"_a, nb::kw_only(), "first_experts"_a = FirstExperts(), "alignment"_a = 1, Waits(),
      R"(
For ranks that all have the same tokens: each row is needed once, whoever reads its result. For inference. Not
collective; ranks whose ids differ get Mismatch in the first operation that uses it.)");
}

}  // namespace expar::python
