// What shared experts are to a layer whose ranks all hold them: a part of the output that is there already.
#pragma once

#include <expar/context.h>
#include <expar/layer.h>

#include "src/layer/shared_expert.h"

namespace expar {

class SharedPart {
 public:
  explicit SharedPart(const MoeLayerOptions& options) : shape_(options.shared_shape()), gate_(options.shared_gate) {}

  /// Fills record.y and record.gate; padding gives zeros.
  ///   x    : [T, H] of the layer's dtype
  ///   mask : [T] int8 or absent; 0 is padding
  void forward(const Context& context, const SharedWeights& weights, ConstTensor x, ConstTensor mask,
               SharedRecord& record);
  /// Overwrites gradients(); returns their part of dx, [T, H] f32, until the next call.
  Tensor backward(const Context& context, const SharedWeights& weights, const MoeRecord& record, ConstTensor dout,
                  const SharedRecord& made);
  const SharedGradients& gradients() const { return gradients_; }

 private:
  ConstTensor for_gate(const Context& context, ConstTensor x);

  ExpertShape shape_;
  bool gate_;
  Buffer x_, wide_x_, dout_, up_, down_, gate_memory_;
  SharedGradients gradients_;
  SharedScratch scratch_;
};

}  // namespace expar
