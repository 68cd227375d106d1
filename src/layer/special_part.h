// What special experts are to a layer: slots that no plan has, and a part of the output that is there already.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <expar/layer.h>

#include "src/layer/parameters.h"

namespace expar {

class SpecialPart {
 public:
  explicit SpecialPart(const MoeLayerOptions& options) : experts_(options.special), first_(options.routed_experts()) {}
  explicit operator bool() const { return experts_.count() > 0; }

  /// `ids` with -1 for special experts.
  Tensor routed(const Tensor& ids, Buffer& memory) const;
  /// The other way round: `routed`, with the special experts of `ids`.
  Tensor restored(const Tensor& routed, const Tensor& ids, Buffer& memory) const;
  /// The slots of every expert over all ranks: `routed` [E], then those of special experts. Collective.
  std::vector<std::int64_t> counts(const Context& context, const Routing& routing,
                                   std::span<const std::int64_t> routed) const;

  ///   x : [T, H] f32
  SpecialPass pass(const Routing& routing, ConstTensor x, const LayerParameters& parameters) const {
    return {experts_, first_, x, routing.ids, routing.weights, parameters.special_mix(), parameters.special_value()};
  }

  /// [T, H] f32: what they give, and `shared` [T, H] f32, times `gate` [T] where there is one, where there is that.
  Tensor forward(const Context& context, const SpecialPass& pass, ConstTensor shared, ConstTensor gate, Buffer& memory);

  /// As special_backward; overwrites gradients().
  void backward(const Context& context, const SpecialPass& pass, std::span<const std::int64_t> shards, ConstTensor dout,
                Tensor dx, Tensor dweights);
  const SpecialGradients& gradients() const { return gradients_; }

 private:
  SpecialExperts experts_;
  std::int64_t first_;
  Buffer mix_, value_;
  SpecialGradients gradients_;
};

}  // namespace expar
