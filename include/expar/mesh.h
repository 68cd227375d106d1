// Ranks in a grid whose directions have names, and the groups along each.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <expar/communicator.h>

namespace expar {

struct MeshDim {
  std::string name;  // "ep"
  int size = 1;
};

/// Rank r stands at the coordinates that r has as a number whose digits are the dims, the last one fastest: with dp 2,
/// ep 4 ranks 0 to 3 are the first row of ep. A cheap handle.
class Mesh {
 public:
  /// Collective over `communicator`. Throws Error: bad_argument (no dims, a size below 1, a name twice or empty, or a
  /// product that is not the number of ranks), mismatch (ranks name other dims), as Communicator::split.
  /// Cost: one meeting, and one for each dim.
  Mesh(Communicator communicator, std::vector<MeshDim> dims);

  const std::vector<MeshDim>& dims() const { return dims_; }
  const Communicator& communicator() const { return communicator_; }
  bool has(std::string_view dim) const;
  /// Ranks along `dim`; 1 for a dim that the mesh does not have.
  int size(std::string_view dim) const;
  /// This rank's place along `dim`; 0 for a dim that the mesh does not have.
  int coordinate(std::string_view dim) const;
  /// The ranks that differ from this one along `dim` alone, in its order.
  /// Throws Error: bad_argument (no such dim).
  const Communicator& group(std::string_view dim) const;
  /// The ranks that differ along these dims alone, in the order of the mesh.
  /// Collective over communicator(). Throws Error: bad_argument (no such dim: on this rank alone, before it meets the
  /// others), as Communicator::split. Cost: one meeting.
  Communicator join(const std::vector<std::string>& dims) const;

 private:
  int coordinate(std::size_t dim) const;

  Communicator communicator_;
  std::vector<MeshDim> dims_;
  std::vector<Communicator> groups_;  // along each dim
};

/// Reads "dp=2,ep=4". Throws Error: bad_argument, saying what is wrong with which part.
std::vector<MeshDim> parse_mesh(std::string_view text);

}  // namespace expar
