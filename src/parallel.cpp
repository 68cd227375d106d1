// The groups of a mesh that tokens and experts are shared along.
#include <expar/parallel.h>

#include <string>

#include <expar/operation.h>

namespace expar {

void check_dims(const std::vector<MeshDim>& dims) {
  for (const MeshDim& dim : dims) {
    if (dim.name == "dp" || dim.name == "ep" || dim.name == "tp") continue;
    throw Error(ErrorCode::bad_argument, "the mesh has a dim " + dim.name + "; there are dp, ep and tp");
  }
}

Parallel::Parallel(const Context& whole, const std::vector<MeshDim>& dims) : Parallel(whole) {
  meet(all.communicator(), Signature("parallel").with("dims", static_cast<std::int64_t>(dims.size())), [&] {
    check_dims(dims);
    return Operation::Words{};
  });
  if (dims.empty()) return;
  const Mesh mesh(all.communicator(), dims);
  const auto along = [&](const std::vector<std::string>& wanted) {
    std::vector<std::string> there;
    for (const std::string& dim : wanted) {
      if (mesh.has(dim)) there.push_back(dim);
    }
    return mesh.join(there);
  };
  data = all.on(along({"dp", "ep"}));
  experts = all.on(along({"ep"}));
  for (auto dim = dims.rbegin(); dim != dims.rend() && dim->name != "ep"; ++dim) {
    if (dim->name == "dp") stride = dim->size;
  }
  if (mesh.size("dp") > 1) replicas = mesh.group("dp");
  if (mesh.size("tp") > 1) tensor = mesh.group("tp");
}

}  // namespace expar
