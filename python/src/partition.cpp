// include/expar/partition.h
#include <expar/partition.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include "python/src/bind.h"
#include "python/src/tensor.h"

namespace expar::python {

using namespace nb::literals;

void bind_partition(nb::module_& m) {
  m.def(
      "join_slices",
      [](const Context& c, const Plan& plan, const In& slices, const Out& x) {
        collective(
            c, [&] { return std::tuple(read(slices, "slices"), written(x, "x")); },
            [&](const Context& asked, ConstTensor from, Tensor to) { join_slices(asked, plan, from, to); });
      },
      "context"_a, "plan"_a, "slices"_a, "x"_a, Waits(), R"(
Rebuilds on each rank the rows that its experts read, from the slices of all ranks.

plan   : of make_replicated_plan
slices : [T, H_r], columns ``part_of(H, rank, P)`` of all tokens, f32 or bf16
x      : [T, H], written; rows of tokens that go to no expert here are left as they are
Collective: H and dtype are the same on all ranks. Raises BadArgument, NoMemory, Mismatch, Timeout, PeerLost, Internal:
the same on every rank. Cost: a slice goes once to each other rank that needs its row.)");
}

}  // namespace expar::python
