// The experts that every token visits: each rank has them all and runs them on its own tokens.
#pragma once

#include <expar/context.h>

#include "src/layer/record.h"

namespace expar {

/// One expert (of several, side by side along the inner dimension), and the gate where there is one.
struct SharedWeights {
  ExpertWeights expert;  // of one group
  ConstTensor gate;      // [H] f32, or absent
};

/// Of each of this rank's shards.
struct SharedGradients {
  Tensor up, down;  // [S, up_rows, H], [S, H, F]
  Tensor gate;      // [S, H]
};

/// What backward works in.
struct SharedScratch {
  Buffer wide_dout, dy, dh, dpre, dgate, dx;
};

/// gate [T] = sigmoid(x . w).
///   w, x : [H] and [T, H] f32
void open_gate(const Context& context, const ConstTensor& w, const ConstTensor& x, const Tensor& gate);

/// record.y [T, H] f32 = expert(x), and record.gate [T] = sigmoid(x . gate), which combine multiplies it by.
///   x      : [T, H] of the shape's dtype; wide_x the same in f32
void shared_forward(const Context& context, const ExpertShape& shape, const SharedWeights& weights, ConstTensor x,
                    ConstTensor wide_x, SharedRecord& record);

/// Overwrites the gradients of every shard; returns the gradient of x through expert and gate, [T, H] f32.
///   shards : [S + 1] from 0 to T
///   dout   : [T, H] of the shape's dtype, the gradient of gate * y
Tensor shared_backward(const Context& context, const ExpertShape& shape, const SharedWeights& weights, ConstTensor x,
                       ConstTensor wide_x, std::span<const std::int64_t> shards, ConstTensor dout,
                       const SharedRecord& record, const SharedGradients& gradients, SharedScratch& scratch);

}  // namespace expar
