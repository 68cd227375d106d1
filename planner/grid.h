// Ranks that do not exist: a mesh of data, expert and tensor parallelism, laid on nodes.
#pragma once

#include <string_view>
#include <vector>

#include <expar/mesh.h>

namespace expar::planner {

/// Rank r stands where it would in a Mesh of these dims. Its node is r divided by the ranks of a node; the last node
/// may have fewer.
class Grid {
 public:
  /// ranks_per_node 0: all ranks are on one node.
  /// Throws Error: bad_argument (a dim of another name, twice, or of a size below 1; more than 1,024 ranks).
  Grid(std::vector<MeshDim> dims, int ranks_per_node);

  int ranks() const { return ranks_; }
  int nodes() const { return (ranks_ + ranks_per_node_ - 1) / ranks_per_node_; }
  int node(int rank) const { return rank / ranks_per_node_; }
  /// 1 for a dim that the grid does not have.
  int size(std::string_view dim) const;
  /// All ranks, in groups that differ along `dims` alone; groups and the ranks in each ascend.
  std::vector<std::vector<int>> groups(const std::vector<std::string_view>& dims) const;

 private:
  std::vector<MeshDim> dims_;
  int ranks_ = 1;
  int ranks_per_node_ = 1;
};

}  // namespace expar::planner
