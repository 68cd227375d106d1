// The lists of an inbox: which row each position of an expert takes, built from the tags that travel beside the rows.
#pragma once

#include <cstdint>
#include <memory>
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

/// The lists [R] that an inbox's experts gather by.
class Lists {
 public:
  /// Begins with the rows that stay on this rank.
  Lists(const Context& context, const Plan& plan, const float* weights);
  /// The rows of another rank, from the `tags` [n, K] that came beside them. Walks them in order, so that no position
  /// written by a peer is ever followed. False if they are not what its counts said.
  bool add(const Plan& plan, int source, const SlotTag* tags);
  std::span<const RowRef> refs() const { return std::span(refs_).first(refs_.size() - 1); }
  std::span<const float> weights() const { return std::span(weights_).first(weights_.size() - 1); }

 private:
  std::shared_ptr<std::pmr::memory_resource> memory_;
  std::pmr::vector<RowRef> refs_;  // [R + 1], the last for slots that are elsewhere
  std::pmr::vector<float> weights_;
};

}  // namespace expar
