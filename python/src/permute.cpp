// include/expar/permute.h
#include <expar/permute.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "python/src/bind.h"
#include "python/src/tensor.h"

namespace expar::python {

using namespace nb::literals;

void bind_permute(nb::module_& m) {
  nb::class_<ExpertMajor>(m, "ExpertMajor", "An order of rows, expert by expert and source by source in each.")
      .def_prop_ro(
          "indices",
          [](nb::handle self) {
            return view(std::span<const std::int32_t>(nb::cast<const ExpertMajor&>(self).indices), self);
          },
          "[N] int32, the rank-major row that stands at each place of the expert-major order")
      .def_prop_ro(
          "rows",
          [](nb::handle self) {
            return view(std::span<const std::int64_t>(nb::cast<const ExpertMajor&>(self).rows), self);
          },
          "[L] int64 rows of each local expert");
  m.def(
      "expert_major", [](const std::vector<std::int64_t>& counts, int ranks) { return expert_major(counts, ranks); },
      "counts"_a, "ranks"_a, R"(
The order of the rows that came from some ranks for L experts, for callers who carry rows by an all-to-all of their own.

counts : [ranks, L], flat: rows from each rank for each expert)");
  const auto indices = [](const In& array) {
    const ConstTensor all = read(array, "indices");
    return std::span<const std::int32_t>(all.as<std::int32_t>(), static_cast<std::size_t>(all.elements()));
  };
  m.def(
      "permute_rows",
      [indices](const In& rows, const In& order, const Out& out) {
        permute_rows(read(rows, "rows"), indices(order), written(out, "out"));
      },
      "rows"_a, "indices"_a, "out"_a, "out[i] = rows[indices[i]]: from rank-major to expert-major. Not collective.");
  m.def(
      "unpermute_rows",
      [indices](const In& rows, const In& order, const Out& out) {
        unpermute_rows(read(rows, "rows"), indices(order), written(out, "out"));
      },
      "rows"_a, "indices"_a, "out"_a, "out[indices[i]] = rows[i]: what permute_rows did, undone. Not collective.");
}

}  // namespace expar::python
