// Mesh: coordinates, and a split of the communicator for each dim.
#include <expar/mesh.h>

#include <algorithm>
#include <charconv>
#include <utility>

#include <expar/operation.h>

#include "src/util/check.h"

namespace expar {
namespace {

std::string shown(const std::vector<MeshDim>& dims) {
  std::string text;
  for (const MeshDim& dim : dims) text += (text.empty() ? "" : ",") + dim.name + "=" + std::to_string(dim.size);
  return text;
}

void check(const std::vector<MeshDim>& dims, int ranks) {
  if (dims.empty()) refuse("a mesh has no dims; name some, like ep=" + std::to_string(ranks));
  std::int64_t product = 1;
  for (std::size_t d = 0; d < dims.size(); ++d) {
    const MeshDim& dim = dims[d];
    if (dim.name.empty()) refuse("dim " + std::to_string(d) + " of the mesh has no name");
    if (dim.size < 1) refuse("dim " + dim.name + " of the mesh has size " + std::to_string(dim.size) + ", below 1");
    const auto same = [&](const MeshDim& other) { return other.name == dim.name; };
    if (std::count_if(dims.begin(), dims.end(), same) > 1) refuse("the mesh names dim " + dim.name + " twice");
    product = std::min<std::int64_t>(product * dim.size, std::int64_t{1} << 31);
  }
  if (product != ranks) {
    refuse("the mesh " + shown(dims) + " has " + std::to_string(product) + " places for " + std::to_string(ranks) +
           " ranks");
  }
}

/// Throws the same error on every rank unless all name the same dims, and good ones.
void agree(const Communicator& communicator, const std::vector<MeshDim>& dims) {
  const std::string name = std::string("mesh ").append(shown(dims));
  meet(communicator, Signature(name), [&] {
    check(dims, communicator.size());
    return Operation::Words{};
  });
}

}  // namespace

Mesh::Mesh(Communicator communicator, std::vector<MeshDim> dims)
    : communicator_(std::move(communicator)), dims_(std::move(dims)) {
  agree(communicator_, dims_);
  for (const MeshDim& dim : dims_) groups_.push_back(join({dim.name}));
}

bool Mesh::has(std::string_view dim) const {
  return std::any_of(dims_.begin(), dims_.end(), [&](const MeshDim& d) { return d.name == dim; });
}

int Mesh::size(std::string_view dim) const {
  const auto found = std::find_if(dims_.begin(), dims_.end(), [&](const MeshDim& d) { return d.name == dim; });
  return found == dims_.end() ? 1 : found->size;
}

int Mesh::coordinate(std::size_t dim) const {
  int rank = communicator_.rank();
  for (std::size_t d = dims_.size() - 1; d > dim; --d) rank /= dims_[d].size;
  return rank % dims_[dim].size;
}

int Mesh::coordinate(std::string_view dim) const {
  for (std::size_t d = 0; d < dims_.size(); ++d) {
    if (dims_[d].name == dim) return coordinate(d);
  }
  return 0;
}

const Communicator& Mesh::group(std::string_view dim) const {
  for (std::size_t d = 0; d < dims_.size(); ++d) {
    if (dims_[d].name == dim) return groups_[d];
  }
  refuse("the mesh " + shown(dims_) + " has no dim " + std::string(dim));
}

Communicator Mesh::join(const std::vector<std::string>& dims) const {
  for (const std::string& dim : dims) {
    if (!has(dim)) refuse("the mesh " + shown(dims_) + " has no dim " + dim);
  }
  // Ranks of one group have all other coordinates in common.
  int others = 0;
  for (std::size_t d = 0; d < dims_.size(); ++d) {
    if (std::find(dims.begin(), dims.end(), dims_[d].name) != dims.end()) continue;
    others = others * dims_[d].size + coordinate(d);
  }
  return communicator_.split(others);
}

std::vector<MeshDim> parse_mesh(std::string_view text) {
  std::vector<MeshDim> dims;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view part = text.substr(begin, end - begin);
    begin = end + 1;
    const std::size_t equals = part.find('=');
    MeshDim dim;
    const char* last = part.data() + part.size();
    const bool named = equals != std::string_view::npos && equals > 0;
    const auto [stop, error] = named ? std::from_chars(part.data() + equals + 1, last, dim.size)
                                     : std::from_chars_result{part.data(), std::errc::invalid_argument};
    if (error != std::errc() || stop != last || dim.size < 1) {
      refuse(std::string("'").append(part).append("' is no part of a mesh, which is written like dp=2,ep=4"));
    }
    dim.name = part.substr(0, equals);
    dims.push_back(std::move(dim));
  }
  return dims;
}

}  // namespace expar
