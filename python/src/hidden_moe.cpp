// include/expar/hidden_moe.h
#include <expar/hidden_moe.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "python/src/bind.h"
#include "python/src/error.h"
#include "python/src/experts.h"

namespace expar::python {
namespace {

using namespace nb::literals;

constexpr Named<HiddenPartition> kPartitions[] = {{"gathered", HiddenPartition::gathered},
                                                  {"sliced", HiddenPartition::sliced}};
constexpr Named<GroupList> kGroupLists[] = {{"cumulative", GroupList::cumulative}, {"counts", GroupList::counts}};

/// A layer, and what of its options the checks here need.
struct Hidden {
  HiddenMoe moe;
  std::int64_t experts = 0;
};

/// Of a batch whose memory goes when the kernel has returned.
struct BatchArrays {
  View rows;
  Integers<std::int64_t> group_list;
  View out;
};

using Kernel = nb::typed<nb::callable, void(BatchArrays)>;

void make_hidden(Hidden* self, const Context& context, std::int64_t hidden, const RouterOptions& router,
                 bool normalize_router_logits, const std::string& partition, bool slices,
                 const std::string& group_list) {
  HiddenMoeOptions options{
      .hidden = hidden, .router = router, .normalize_router_logits = normalize_router_logits, .slices = slices};
  const Context asked = context.attempt([&] {
    options.partition = named(kPartitions, "partition", partition).value;
    options.group_list = named(kGroupLists, "group_list", group_list).value;
  });
  new (self) Hidden{HiddenMoe(asked, options), router.experts};
}

/// What both kinds of forward pass read.
struct InputArrays {
  const In &x, &logits, &ids, &weights, &bias;

  HiddenMoeInputs get() const {
    return {.x = read(x, "x"),
            .logits = read(logits, "logits"),
            .ids = read(ids, "ids"),
            .weights = read(weights, "weights"),
            .bias = read(bias, "bias")};
  }
};

/// The kernel in Python, which must not keep what it is given. With the GIL.
void call(const Kernel& kernel, const ExpertBatch& batch) {
  const nb::object lease = nb::dict();  // every view of the batch holds it
  kernel(BatchArrays{view(batch.rows, lease), view(batch.group_list, lease), view(batch.out, lease)});
  if (Py_REFCNT(lease.ptr()) > 1) PyGC_Collect();
  if (Py_REFCNT(lease.ptr()) == 1) return;
  throw Error(ErrorCode::bad_argument, "the kernel has kept an array of its batch, whose memory goes: keep a copy");
}

void forward_kernel(Hidden& self, const Context& context, const In& x, const Kernel& kernel, const Out& out,
                    const In& logits, const In& ids, const In& weights, const In& bias) {
  std::optional<nb::python_error> raised;
  HiddenMoeInputs inputs;
  Tensor to;
  const Context asked = context.attempt([&] {
    inputs = InputArrays{x, logits, ids, weights, bias}.get();
    to = written(out, "out");
  });
  const auto run = [&](const ExpertBatch& batch) {
    const nb::gil_scoped_acquire gil;
    try {
      call(kernel, batch);
    } catch (const nb::python_error& error) {
      raised.emplace(error);
      throw as_error(error, context.communicator().job_rank(context.rank()));
    }
  };
  try {
    self.moe.forward(asked, inputs, run, to);
  } catch (const Error&) {
    if (raised) throw *raised;  // as it was raised
    throw;
  }
}

void forward_experts(Hidden& self, const Context& context, const In& x, const ExpertShape& shape,
                     const ExpertArrays& experts, const Out& out, const In& logits, const In& ids, const In& weights,
                     const In& bias) {
  HiddenMoeInputs inputs;
  ExpertWeights held;
  Tensor to;
  const Context asked = context.attempt([&] {
    inputs = InputArrays{x, logits, ids, weights, bias}.get();
    held = experts.of(shape, experts_of(context.rank(), context.size(), self.experts).count);
    to = written(out, "out");
  });
  self.moe.forward(asked, inputs, shape, held, to);
}

}  // namespace

void bind_hidden_moe(nb::module_& m) {
  nb::class_<BatchArrays>(m, "ExpertBatch", R"(
What a kernel of the caller's own gets: R rows, those of one local expert after those of another. Its arrays are views
that end with the call of the kernel.)")
      .def_ro("rows", &BatchArrays::rows, "[R, W]")
      .def_ro("group_list", &BatchArrays::group_list,
              "[L] int64: where the rows of each local expert end, or how many each has")
      .def_ro("out", &BatchArrays::out, "[R, W], where the kernel leaves its results");

  nb::class_<Hidden>(m, "HiddenMoe", R"(
The MoE layer of ranks that all have the same tokens: each holds some experts and gets its slice of the output, columns
``part_of(hidden, rank, P)``, H_r of them. For inference.)")
      .def("__init__", &make_hidden, "context"_a, nb::kw_only(), "hidden"_a, "router"_a,
           "normalize_router_logits"_a = true, "partition"_a = "gathered", "slices"_a = false,
           "group_list"_a = "cumulative", Waits(), R"(
hidden     : H
router     : RouterOptions: E, K and how logits become weights
normalize_router_logits : off: the K largest logits are the weights as they are
partition  : "gathered": experts take whole rows, W = H; "sliced": each slice by itself, W = ceil(H / P)
slices     : x is this rank's slice [T, H_r], not [T, H]
group_list : of a kernel's batch: "cumulative" or "counts"
Collective: the same on all ranks, but for group_list. Raises BadArgument, Mismatch, Timeout, PeerLost: the same on every
rank.)")
      .def_prop_ro(
          "width", [](const Hidden& h) { return h.moe.width(); }, "W: the width of the rows that experts take")
      .def("forward", &forward_kernel, "context"_a, "x"_a, "kernel"_a, "out"_a, nb::kw_only(), "logits"_a = nb::none(),
           "ids"_a = nb::none(), "weights"_a = nb::none(), "bias"_a = nb::none(), Waits(), R"(
out[t] = sum over slots k of weights[t, k] * this rank's slice of expert ids[t, k] at what goes through it, + bias.

x       : [T, H], or [T, H_r] where it is slices, f32 or bf16
kernel  : called with an ExpertBatch, whose arrays it must not keep
out     : [T, H_r] of x's dtype, written
logits  : [T, E] f32, or ids [T, K] int32 and weights [T, K] f32
bias    : [H_r] f32, added to each row
Collective: all but slices and bias is the same on all ranks. Raises BadArgument, Mismatch (ranks whose ids differ),
Timeout, PeerLost: the same on every rank. An exception of the kernel ends the job.)")
      .def("forward", &forward_experts, "context"_a, "x"_a, "shape"_a, "experts"_a, "out"_a, nb::kw_only(),
           "logits"_a = nb::none(), "ids"_a = nb::none(), "weights"_a = nb::none(), "bias"_a = nb::none(), Waits(), R"(
The same with expar's experts: ExpertShape of hidden size W and ExpertWeights of this rank's.)")
      .def_prop_ro(
          "routing", [](const Hidden& h) -> const Routing& { return h.moe.routing(); },
          nb::rv_policy::reference_internal, "Routing of the last pass that was given logits");
}

}  // namespace expar::python
