// include/expar/mesh.h and parallel.h
#include <expar/mesh.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <expar/parallel.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "python/src/bind.h"

namespace expar::python {
namespace {

using namespace nb::literals;
using Dims = std::vector<std::pair<std::string, int>>;

std::vector<MeshDim> mesh_dims(const Dims& dims) {
  std::vector<MeshDim> all;
  for (const auto& [name, size] : dims) all.push_back({name, size});
  return all;
}

std::optional<Communicator> or_none(const Communicator& group) {
  if (!group) return std::nullopt;
  return group;
}

}  // namespace

void bind_mesh(nb::module_& m) {
  nb::class_<Mesh>(m, "Mesh", R"(
Ranks in a grid whose directions have names, and the groups along each; the last dim is the fastest.)")
      .def(
          "__init__", [](Mesh* self, const Communicator& c, const Dims& dims) { new (self) Mesh(c, mesh_dims(dims)); },
          "communicator"_a, "dims"_a, Waits(), R"(
dims : [("dp", 2), ("ep", 4)]; their product is the number of ranks
Collective. Raises BadArgument, Mismatch (ranks name other dims), Timeout, PeerLost.)")
      .def_prop_ro("dims",
                   [](const Mesh& mesh) {
                     Dims all;
                     for (const MeshDim& dim : mesh.dims()) all.emplace_back(dim.name, dim.size);
                     return all;
                   })
      .def_prop_ro("communicator", &Mesh::communicator)
      .def(
          "size", [](const Mesh& mesh, const std::string& dim) { return mesh.size(dim); }, "dim"_a,
          "Ranks along ``dim``; 1 for a dim that the mesh does not have.")
      .def(
          "coordinate", [](const Mesh& mesh, const std::string& dim) { return mesh.coordinate(dim); }, "dim"_a,
          "This rank's place along ``dim``.")
      .def(
          "group", [](const Mesh& mesh, const std::string& dim) { return mesh.group(dim); }, "dim"_a,
          "The ranks that differ from this one along ``dim`` alone, in its order.")
      .def(
          "has", [](const Mesh& mesh, const std::string& dim) { return mesh.has(dim); }, "dim"_a)
      .def("join", &Mesh::join, "dims"_a, Waits(),
           "The ranks that differ along these dims alone, in the order of the mesh. Collective over communicator.");
  m.def(
      "parse_mesh",
      [](const std::string& text) {
        Dims all;
        for (const MeshDim& dim : parse_mesh(text)) all.emplace_back(dim.name, dim.size);
        return all;
      },
      "text"_a, "Reads \"dp=2,ep=4\". Raises BadArgument, saying what is wrong with which part.");

  nb::class_<Parallel>(m, "Parallel", R"(
How the ranks of a mesh share the tokens and experts of a layer. Dims, each of which may be missing:

dp : replicas of the experts, with other tokens
ep : tokens travel among these
tp : slices of the same experts, with the same tokens)")
      .def(
          "__init__",
          [](Parallel* self, const Context& whole, const Dims& dims) { new (self) Parallel(whole, mesh_dims(dims)); },
          "context"_a, "dims"_a = Dims(), Waits(), R"(
No dims: all ranks along ep. Collective. Raises BadArgument (a dim of another name), as Mesh.)")
      .def_ro("all", &Parallel::all)
      .def_ro("data", &Parallel::data, "along dp and ep: ranks with other tokens")
      .def_ro("experts", &Parallel::experts, "along ep")
      .def_prop_ro(
          "replicas", [](const Parallel& p) { return or_none(p.replicas); }, "along dp; None: there is one")
      .def_prop_ro(
          "tensor", [](const Parallel& p) { return or_none(p.tensor); }, "along tp; None: nothing is in slices");
}

}  // namespace expar::python
