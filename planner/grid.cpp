// Coordinates of ranks in a grid.
#include "planner/grid.h"

#include <algorithm>
#include <array>
#include <map>
#include <string>

#include <expar/error.h>

namespace expar::planner {
namespace {

/// As many as --ranks takes.
constexpr int kMaxRanks = 1024;
constexpr std::array<std::string_view, 3> kNames = {"dp", "ep", "tp"};

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::bad_argument, message); }

}  // namespace

Grid::Grid(std::vector<MeshDim> dims, int ranks_per_node) : dims_(std::move(dims)) {
  for (auto dim = dims_.begin(); dim != dims_.end(); ++dim) {
    if (std::find(kNames.begin(), kNames.end(), dim->name) == kNames.end()) {
      refuse("a mesh to plan has the dims dp, ep and tp, not '" + dim->name + "'");
    }
    if (std::any_of(dims_.begin(), dim, [&](const MeshDim& d) { return d.name == dim->name; })) {
      refuse("the mesh names dim " + dim->name + " twice");
    }
    if (dim->size < 1) {
      refuse("dim " + dim->name + " of the mesh has size " + std::to_string(dim->size) + ", below 1");
    }
    if (dim->size > kMaxRanks / ranks_) refuse("the mesh has more than " + std::to_string(kMaxRanks) + " ranks");
    ranks_ *= dim->size;
  }
  ranks_per_node_ = ranks_per_node > 0 ? ranks_per_node : ranks_;
}

int Grid::size(std::string_view dim) const {
  const auto found = std::find_if(dims_.begin(), dims_.end(), [&](const MeshDim& d) { return d.name == dim; });
  return found == dims_.end() ? 1 : found->size;
}

std::vector<std::vector<int>> Grid::groups(const std::vector<std::string_view>& dims) const {
  // What a rank's number is with zeros for the digits of `dims` names its group.
  std::map<int, std::vector<int>> by_rest;
  for (int rank = 0; rank < ranks_; ++rank) {
    int rest = rank;
    int stride = 1;
    for (auto dim = dims_.rbegin(); dim != dims_.rend(); ++dim) {
      const int digit = rank / stride % dim->size;
      if (std::find(dims.begin(), dims.end(), dim->name) != dims.end()) rest -= digit * stride;
      stride *= dim->size;
    }
    by_rest[rest].push_back(rank);
  }
  std::vector<std::vector<int>> groups;
  for (auto& [rest, ranks] : by_rest) groups.push_back(std::move(ranks));
  return groups;
}

}  // namespace expar::planner
