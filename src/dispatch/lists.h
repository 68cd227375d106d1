// The lists of an inbox: which row each position of an expert takes, built from the tags that travel beside the rows.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <expar/dispatch.h>

namespace expar {

/// Beside a row, per slot of its token: the expert as its rank numbers it (-1: the slot goes elsewhere) and the weight.
struct SlotTag {
  std::int32_t expert;
  float weight;
};

/// The tags [n, K] of `tokens` for rank `destination`.
void write_tags(const Plan& plan, int destination, std::span<const std::int32_t> tokens, const float* weights,
                SlotTag* tags);

/// The list [R] from this rank's own ids and `tags` [U, K] of the others. Walks rows in order, so that no position
/// written by a peer is ever followed; ends the job where tags disagree with the plan's counts.
std::vector<RowRef> build_lists(const Communicator& communicator, const Plan& plan, const float* weights,
                                const SlotTag* tags);

}  // namespace expar
