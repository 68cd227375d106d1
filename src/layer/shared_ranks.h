// Shared experts on ranks of their own: where they lie, and how tokens find them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <expar/layer.h>

namespace expar {

/// The first ranks hold one copy of the shared experts each, the others the router's experts. In the plan the copies
/// are the first experts, and each token has a slot more, the last, that goes to one of them.
class SharedRanks {
 public:
  /// Throws Error: bad_argument, naming the option.
  SharedRanks(const MoeLayerOptions& options, int rank, int ranks);

  bool hold_here() const { return rank_ < copies_; }
  /// Those of the router's experts that this rank holds.
  ExpertRange routed() const;
  /// Of the plan; see PlanOptions.
  std::int64_t experts() const { return first_experts_.back(); }
  std::span<const std::int64_t> first_experts() const { return first_experts_; }

  /// [T, K] ids or weights of the router's choice with the slot of the shared experts; the ids are valid until the next
  /// call.
  ///   mask : [T] int8 or absent; 0 is padding
  ///   gate : [T] f32, the weight of the shared experts; absent: 1
  ConstTensor ids(ConstTensor routed, ConstTensor mask);
  ConstTensor weights(ConstTensor routed, ConstTensor gate, Buffer& memory) const;

 private:
  int copies_, rank_;
  std::int64_t nearest_;                     // the copy that this rank's tokens visit
  std::vector<std::int64_t> first_experts_;  // [P + 1]
  Buffer ids_;
};

}  // namespace expar
