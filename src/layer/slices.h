// Experts in slices of their inner dimension (tensor parallelism): which slice a rank has, and a sum over them.
#pragma once

#include <optional>

#include <expar/layer.h>

namespace expar {

/// The ranks that hold slices of the same experts, and hand in the same tokens; one rank where nothing is in slices.
class Slices {
 public:
  /// Collective over options.tensor. Throws Error: bad_argument, mismatch.
  Slices(const Context& context, const MoeLayerOptions& options);

  /// Of the inner dimension F.
  ExpertRange own() const { return own_; }

  /// Sums f32 values over the slices, in place. Collective over the slices.
  void sum(Tensor values);

 private:
  std::optional<Context> ranks_;
  ExpertRange own_;
  Buffer sum_;
};

}  // namespace expar
