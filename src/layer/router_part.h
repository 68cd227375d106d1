// What the router is to a layer: from tokens to logits, and from the gradients of the weights to those of its
// parameters and of the tokens.
#pragma once

#include <optional>

#include <expar/context.h>
#include <expar/layer.h>

#include "src/layer/jitter.h"
#include "src/layer/parameters.h"

namespace expar {

class RouterPart {
 public:
  explicit RouterPart(const MoeLayerOptions& options) : options_(options) {}

  /// The logits [T, E] f32, until the next call.
  ///   x : [T, H] of the layer's dtype
  ConstTensor score(const Context& context, const LayerParameters& parameters, ConstTensor x,
                    const std::optional<Jitter>& jitter);
  /// Overwrites the gradients of every shard; returns its part of dx, [T, H] of the layer's dtype, until the next call.
  ///   by_slot : [T, K] f32, the gradient of the weights
  ConstTensor backward(const Context& context, const LayerParameters& parameters, const MoeRecord& record,
                       ConstTensor by_slot, const std::optional<Jitter>& jitter);

  const Tensor& weight_gradients() const { return weight_gradients_; }  // [S, E, H] f32
  const Tensor& bias_gradients() const { return bias_gradients_; }      // [S, E] f32, where there is a bias

 private:
  /// The tokens as the router reads them.
  ConstTensor read(const Context& context, ConstTensor x, const std::optional<Jitter>& jitter);

  const MoeLayerOptions& options_;
  Buffer wide_, jittered_, logits_, dlogits_, dx_, low_dx_, weight_memory_, bias_memory_;
  Tensor weight_gradients_, bias_gradients_;
};

}  // namespace expar
