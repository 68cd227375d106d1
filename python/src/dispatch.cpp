// include/expar/dispatch.h
#include <expar/dispatch.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>
#include <tuple>

#include "python/src/bind.h"
#include "python/src/norm.h"

namespace expar::python {
namespace {

using namespace nb::literals;

/// What dispatch and its first phase are handed.
struct Sent {
  const In &x, &weights;
  const std::string& layout;
  std::int64_t capacity;
  const std::optional<std::string>& payload;
  const Inbox* lists_of;

  std::tuple<ConstTensor, ConstTensor, DispatchOptions> operator()() const {
    DispatchOptions options{
        .layout = parse_name(kLayouts, "layout", layout), .capacity = capacity, .lists_of = lists_of};
    if (payload) options.payload = parse_dtype(*payload);
    return {read(x, "x"), read(weights, "weights"), options};
  }
};

/// What combine and its first phase are handed beside the outbox.
struct Summed {
  const In& weights;
  const Out& out;
  const In &shared, &shared_weights, &residual;
  bool slice = false;
  const Communicator* sum_over = nullptr;
  const NormArrays* norm = nullptr;

  std::tuple<std::optional<ConstTensor>, Tensor, CombineOptions> operator()() const {
    CombineOptions options{.shared = read(shared, "shared"),
                           .shared_weights = read(shared_weights, "shared_weights"),
                           .residual = read(residual, "residual"),
                           .slice = slice};
    if (sum_over != nullptr) options.sum_over = *sum_over;
    if (norm != nullptr) options.norm = norm->get();
    return {weights.absent() ? unweighted : std::optional(read(weights, "weights")), written(out, "out"), options};
  }
};

void bind_dispatching(nb::module_& m) {
  nb::class_<Inbox>(m, "Inbox", R"(
What arrived at this rank. Its memory goes back to the arena with it. The rank's own rows are read where they lie: x must
neither move nor change while the inbox is in use. Arrays are views of the inbox's memory.)")
      .def_prop_ro("plan", &Inbox::plan)
      .def_prop_ro("layout", [](const Inbox& i) { return std::string(name(i.layout())); })
      .def_prop_ro(
          "rows", [](nb::handle self) { return view(nb::cast<const Inbox&>(self).rows(), self); },
          "[U, H] rows of other ranks, source by source, tokens ascending")
      .def_prop_ro(
          "packed", [](nb::handle self) { return view(nb::cast<const Inbox&>(self).packed(), self); },
          "The rows in the shape of the layout: expert_major and rank_major [R, H], padded [L, capacity, H]")
      .def_prop_ro(
          "offsets", [](nb::handle self) { return view(nb::cast<const Inbox&>(self).offsets(), self); },
          "int64, where rows begin in ``packed``: [L + 1], of rank_major [P L + 1]")
      .def_prop_ro(
          "weights",
          [](nb::handle self) {
            const auto values = nb::cast<const Inbox&>(self).weights();
            return view(ConstTensor(values.data(), {static_cast<std::int64_t>(values.size())}), self);
          },
          "[R] f32, the weight that each row came with");

  nb::class_<PendingDispatch>(m, "PendingDispatch", "A dispatch under way.")
      .def("finish", &PendingDispatch::finish, Waits(), nb::keep_alive<0, 1>(),
           "Waits for all rows and returns the Inbox.");

  m.def(
      "dispatch",
      [](const Context& c, const In& x, const In& weights, const Plan& plan, const std::string& layout,
         std::int64_t capacity, const std::optional<std::string>& payload, const Inbox* lists_of) {
        return collective(c, Sent{x, weights, layout, capacity, payload, lists_of},
                          [&](const Context& asked, ConstTensor rows, ConstTensor beside, const DispatchOptions& all) {
                            return dispatch(asked, rows, beside, plan, all);
                          });
      },
      "context"_a, "x"_a, "weights"_a.none(), "plan"_a, nb::kw_only(), "layout"_a = "indexed", "capacity"_a = 0,
      "payload"_a = nb::none(), "lists_of"_a = nb::none(), Waits(), nb::keep_alive<0, 2>(), R"(
Carries each token once to each other rank that holds one of its experts.

x        : [T, H] f32 or bf16, this rank's tokens; must not change while the inbox is in use
weights  : [T, K] f32, travel beside the rows; None: every weight is 1
plan     : from make_plan; the same plan serves combine and the backward pass
layout   : "indexed", "expert_major", "padded" (of ``capacity`` rows per expert) or "rank_major"
payload  : how rows travel: None (as they are), "bf16", "f16", "int8" or "fp8_e4m3"
lists_of : the inbox of an earlier dispatch with the same plan, whose lists serve again
returns  : Inbox
Collective: H, dtype, payload, layout and capacity are the same on all ranks.
Raises BadArgument, Mismatch, NoMemory, Timeout, PeerLost: the same on every rank.
Cost: one read and one write of each row that leaves; packing reads and writes each row once more.)");
  m.def(
      "start_dispatch",
      [](const Context& c, const In& x, const In& weights, const Plan& plan, const std::string& layout,
         std::int64_t capacity, const std::optional<std::string>& payload, const Inbox* lists_of) {
        return collective(c, Sent{x, weights, layout, capacity, payload, lists_of},
                          [&](const Context& asked, ConstTensor rows, ConstTensor beside, const DispatchOptions& all) {
                            return start_dispatch(asked, rows, beside, plan, all);
                          });
      },
      "context"_a, "x"_a, "weights"_a.none(), "plan"_a, nb::kw_only(), "layout"_a = "indexed", "capacity"_a = 0,
      "payload"_a = nb::none(), "lists_of"_a = nb::none(), Waits(), nb::keep_alive<0, 2>(), nb::keep_alive<0, 3>(),
      nb::keep_alive<0, 8>(), "dispatch in two phases: returns at once; PendingDispatch.finish() waits.");
}

void bind_combining(nb::module_& m) {
  nb::class_<Outbox>(m, "Outbox", "Where experts write their R results so that the sources can read them.")
      .def_prop_ro(
          "rows", [](nb::handle self) { return view(nb::cast<const Outbox&>(self).rows(), self); },
          "Row i is the result of the inbox's row i; writable, without a copy")
      .def_prop_ro("layout", [](const Outbox& y) { return std::string(name(y.layout())); });
  m.def(
      "make_outbox",
      [](const Context& c, const Plan& plan, std::int64_t width, const std::string& dtype) {
        return make_outbox(c, plan, width, parse_dtype(dtype));
      },
      "context"_a, "plan"_a, "width"_a, "dtype"_a = "f32",
      "Room for R rows of ``width`` elements in this rank's arena. Not collective.");
  m.def(
      "make_outbox",
      [](const Context& c, const Inbox& inbox, std::int64_t width, const std::string& dtype) {
        return make_outbox(c, inbox, width, parse_dtype(dtype));
      },
      "context"_a, "inbox"_a, "width"_a, "dtype"_a = "f32",
      "The same in the layout of ``inbox``: a kernel that reads row i there writes row i here.");

  nb::class_<PendingCombine>(m, "PendingCombine", "A combine under way.")
      .def("finish", &PendingCombine::finish, Waits(), "Waits for the other ranks' results and sums them into out.");
  m.def(
      "combine",
      [](const Context& c, const Plan& plan, Outbox& y, const In& weights, const Out& out, const In& shared,
         const In& shared_weights, const In& residual, bool slice, const Communicator* sum_over,
         const NormArrays* norm) {
        return collective(c, Summed{weights, out, shared, shared_weights, residual, slice, sum_over, norm},
                          [&](const Context& asked, const std::optional<ConstTensor>& by, Tensor to,
                              const CombineOptions& all) { return combine(asked, plan, y, by, to, all); });
      },
      "context"_a, "plan"_a, "y"_a, "weights"_a.none(), "out"_a, nb::kw_only(), "shared"_a = nb::none(),
      "shared_weights"_a = nb::none(), "residual"_a = nb::none(), "slice"_a = false, "sum_over"_a = nb::none(),
      "norm"_a = nb::none(), Waits(),
      R"(
Brings the results home: out[t] = sum over slots k of weights[t,k] * result(t,k), in slot order, then what is shared,
then the residual, in f32, rounded once. Slots with id -1 are left out.

y        : Outbox [R, H], filled
weights  : [T, K] f32, or ``expar.unweighted`` (None): slots are summed as they are
out      : [T, H] of y's dtype, written; may be the residual itself
shared   : [T, H] f32 added after the slots, each token's times shared_weights [T] where given
residual : [T, H] added last
slice    : of a replicated plan: out is this rank's columns
sum_over : the ranks that hold slices of the same experts, whose parts are summed
norm     : RmsNorm of out's rows, written in the same pass
Collective. Raises BadArgument, Mismatch, NoMemory, Timeout, PeerLost: the same on every rank.
Cost: one read of each of the T K rows where they lie, one write of T rows.)");
  m.def(
      "start_combine",
      [](const Context& c, const Plan& plan, Outbox& y, const In& weights, const Out& out, const In& shared,
         const In& shared_weights, const In& residual, bool slice, const Communicator* sum_over,
         const NormArrays* norm) {
        return collective(c, Summed{weights, out, shared, shared_weights, residual, slice, sum_over, norm},
                          [&](const Context& asked, const std::optional<ConstTensor>& by, Tensor to,
                              const CombineOptions& all) { return start_combine(asked, plan, y, by, to, all); });
      },
      "context"_a, "plan"_a, "y"_a, "weights"_a.none(), "out"_a, nb::kw_only(), "shared"_a = nb::none(),
      "shared_weights"_a = nb::none(), "residual"_a = nb::none(), "slice"_a = false, "sum_over"_a = nb::none(),
      "norm"_a = nb::none(), Waits(), nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>(),
      nb::keep_alive<0, 6>(), nb::keep_alive<0, 7>(), nb::keep_alive<0, 8>(), nb::keep_alive<0, 11>(),
      "combine in two phases: returns at once; PendingCombine.finish() waits.");
  m.def(
      "fetch_slots",
      [](const Context& c, const Plan& plan, Outbox& values, const Out& out) {
        collective(
            c, [&] { return std::tuple(written(out, "out")); },
            [&](const Context& asked, Tensor to) { fetch_slots(asked, plan, values, to); });
      },
      "context"_a, "plan"_a, "values"_a, "out"_a, Waits(), R"(
Brings one f32 row per slot home, unsummed: out [T, K, W] from values [R, W]; zeros where a slot is -1. With W = 1: the
gradient of the weights. Collective. Raises as combine.)");
  m.attr("unweighted") = nb::none();
}

}  // namespace

void bind_dispatch(nb::module_& m) {
  bind_dispatching(m);
  bind_combining(m);
}

}  // namespace expar::python
