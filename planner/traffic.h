// Payload bytes that cross links when rows travel, for each way to move them.
#pragma once

#include <cstdint>
#include <vector>

#include "planner/grid.h"
#include "planner/rows.h"

namespace expar::planner {

/// Bytes that ranks send to others, by the links that they cross. What stays on its rank is left out, and so are
/// counts, tags and weights.
struct Traffic {
  double within_node = 0;
  double between_nodes = 0;

  double bytes() const { return within_node + between_nodes; }
  Traffic& operator+=(const Traffic& other) {
    within_node += other.within_node;
    between_nodes += other.between_nodes;
    return *this;
  }
};

/// Rows of `row_bytes` to each other rank that holds one of their experts: what dispatch moves.
///   group : [rows.ranks] which ranks of the grid these are
/// Source: Plan::bytes, summed over the group.
Traffic once_each(const Rows& rows, const Grid& grid, const std::vector<int>& group, double row_bytes);

/// A row for each slot that belongs to an expert of another rank: what combine moves, and a dispatch that copies a
/// token for each of its experts.
/// Source: 2 T K H (P - 1) / P bytes per rank in bf16 where choices are even (the notebook of AIInfra on distributed
/// MoE, its section on communication).
Traffic once_per_slot(const Rows& rows, const Grid& grid, const std::vector<int>& group, double row_bytes);

/// A ring in the order of the group, in which each rank passes on everything but its successor's piece: an all-gather
/// of `pieces` bytes, piece r from rank r. A reduce-scatter moves the same the other way; an all-reduce is one of each.
/// Source: Patarasuk and Yuan 2009, (P - 1) / P of the whole per rank.
Traffic ring_all_gather(const Grid& grid, const std::vector<int>& group, const std::vector<double>& pieces);

/// All ranks of the group have the tokens of all of them, and of every result each takes its slice of H alone: nothing
/// travels to the experts, and from a row's rank to each other one its slice.
/// Source: include/expar/partition.h without join_slices; K rows of H / P elements per token and rank.
Traffic slices_per_slot(const Rows& rows, const Grid& grid, const std::vector<int>& group, std::int64_t hidden,
                        double element_bytes);

/// The least K at which two rows per slot move no fewer bytes than an all-reduce of the group's tokens, 2 (P - 1) T H
/// elements per rank, if slots leave their rank as often as here. 0: there is none, for none does.
/// With even choices: P, whatever E is.
std::int64_t crossover(const std::vector<Rows>& groups);

}  // namespace expar::planner
