// include/expar/collectives.h
#include <expar/collectives.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <utility>
#include <vector>

#include "python/src/bind.h"
#include "python/src/tensor.h"

namespace expar::python {

using namespace nb::literals;

void bind_collectives(nb::module_& m) {
  m.def("barrier", &barrier, "context"_a, Waits(), "Returns after every rank has entered. Collective.");
  m.def(
      "broadcast",
      [](const Context& c, const Out& data, int root) {
        collective(
            c, [&] { return std::tuple(written(data, "data")); },
            [&](const Context& asked, Tensor all) { broadcast(asked, all, root); });
      },
      "context"_a, "data"_a, "root"_a, Waits(), R"(
``data`` [..] of rank ``root`` replaces that of every other rank, in place. Collective.

Raises BadArgument, Mismatch (another root, size or dtype), NoMemory, Timeout, PeerLost.)");
  m.def(
      "all_gather",
      [](const Context& c, const In& in, const Out& out) {
        collective(
            c, [&] { return std::tuple(read(in, "in"), written(out, "out")); },
            [](const Context& asked, ConstTensor from, Tensor to) { all_gather(asked, from, to); });
      },
      "context"_a, "in_"_a, "out"_a, Waits(), R"(
Concatenates all ranks' ``in_`` [n_r, ...] along the first axis into ``out`` [sum of n_r, ...]; n_r may differ and be 0.
Collective.

Raises BadArgument, Mismatch, NoMemory, Timeout, PeerLost.)");
  m.def(
      "all_reduce",
      [](const Context& c, const In& rows, const Out& out) {
        collective(
            c, [&] { return std::tuple(read(rows, "rows"), written(out, "out")); },
            [](const Context& asked, ConstTensor from, Tensor to) { all_reduce(asked, from, to); });
      },
      "context"_a, "rows"_a, "out"_a, Waits(), R"(
``out`` [N] = the sum over all ranks' ``rows`` [M_r, N] f32, in (rank, row) order: equal rows give equal bytes however
many ranks hold them. Collective.

Raises BadArgument, Mismatch (another N), NoMemory, Timeout, PeerLost.)");
  m.def(
      "reduce_scatter",
      [](const Context& c, const In& rows, const Out& out) {
        collective(
            c, [&] { return std::tuple(read(rows, "rows"), written(out, "out")); },
            [](const Context& asked, ConstTensor from, Tensor to) { reduce_scatter(asked, from, to); });
      },
      "context"_a, "rows"_a, "out"_a, Waits(), R"(
As all_reduce, but rank r keeps elements ``part_of(N, r, P)``. Collective.)");
  m.def(
      "part_of",
      [](std::int64_t elements, int rank, int ranks) {
        const Part part = part_of(elements, rank, ranks);
        return std::pair(part.begin, part.end);
      },
      "elements"_a, "rank"_a, "ranks"_a, "(begin, end) of the elements that a rank keeps in reduce_scatter.");
  m.def(
      "all_to_all_v",
      [](const Context& c, const In& in, const std::vector<std::int64_t>& send_rows, const Out& out,
         const std::vector<std::int64_t>& receive_rows) {
        collective(
            c, [&] { return std::tuple(read(in, "in"), written(out, "out")); },
            [&](const Context& asked, ConstTensor from, Tensor to) {
              all_to_all_v(asked, from, send_rows, to, receive_rows);
            });
      },
      "context"_a, "in_"_a, "send_rows"_a, "out"_a, "receive_rows"_a, Waits(), R"(
Rows of ``in_`` [sum of send_rows, ...], destination by destination, arrive in ``out`` [sum of receive_rows, ...],
source by source. Both counts have P entries. Collective.

Raises BadArgument, Mismatch (ranks see a count differently, which ends the job), NoMemory, Timeout, PeerLost.)");
}

}  // namespace expar::python
