// The experts' feed-forward networks, forward and backward, on rows that dispatch brought.
#pragma once

#include <cstdint>

#include <expar/dispatch.h>

namespace expar {

/// Where the router's weight w of a row meets its expert.
enum class WeightsOn : std::uint8_t {
  output,  // on the result, by combine: w (down h + down_bias)
  inner,   // before the second product: down (w h) + w down_bias, the same but for rounding; combined unweighted
  input,   // on the row: act(up (w x) + up_bias) and so on; combined unweighted (Llama 4)
};

/// L local experts. Gated: up [L, 2F, H] holds gate then up; plain: [L, F, H]. down [L, H, F].
///   y = down(act(up x + up_bias)) + down_bias
struct ExpertShape {
  std::int64_t hidden = 0;  // H
  std::int64_t inner = 0;   // F
  Activation activation = Activation::swiglu;
  ActivationNumbers numbers = {};  // of the activation
  bool bias = false;
  WeightsOn weights_on = WeightsOn::output;
  DType dtype = DType::f32;  // of weights, rows and results: f32 or bf16

  std::int64_t up_rows() const { return gated(activation) ? 2 * inner : inner; }
};

/// Throws Error: bad_argument (naming the value that cannot be).
void validate(const ExpertShape& shape);

/// Biases are f32 and absent where the shape has none.
struct ExpertWeights {
  GroupWeights up, down;
  ConstTensor up_bias;    // [L, up_rows]
  ConstTensor down_bias;  // [L, H]
};

/// f32, in the shapes of the weights.
struct ExpertGradients {
  Tensor up, down, up_bias, down_bias;
};

/// What forward leaves for backward. Reuse one object per layer: it keeps its memory.
struct ExpertsRecord {
  Tensor pre;  // [R, up_rows] before the activation
  Tensor h;    // [R, F] after it
  Buffer pre_memory, h_memory;
  Buffer weighted;  // room for rows that were weighted before a product
};

/// y[i] = expert(row i) for the R rows of the inbox, whose weights count where weights_on says. Not collective.
/// Throws Error: bad_argument (the shape cannot be; weights, inbox or y disagree with it; a plan with an alignment
/// above 1; y is rank_major), no_memory (the record grows). Cost: each weight is read once per block of rows; the rows
/// are gathered by list, not copied, but for rows that are weighted before a product: one read and one write each.
void experts_forward(const Context& context, const ExpertShape& shape, const ExpertWeights& weights, const Inbox& inbox,
                     Outbox& y, ExpertsRecord& record);

/// What backward works in. Reuse one object.
struct ExpertsScratch {
  Buffer dy, weighted_dy, dh, dpre, x, dx;
};

/// The gradient of experts_forward, weighted by the router.
///   dout     : the gradient of the layer's output, dispatched with the same plan (lists_of the forward inbox)
///   y        : what forward wrote
///   dx       : [R, H]  gradient of each gathered row, to be combined unweighted; null: no rank asks for it
///   dweights : [R, 1]  f32, gradient of each row's weight, to be fetched by slot
/// Not collective. Throws Error: bad_argument (as forward; packed weights; gradients, record, dx or dweights disagree
/// with the shape; dout came by another plan), no_memory. Cost: two GEMMs per forward GEMM; without dx one less,
/// unless the weights count on the input.
void experts_backward(const Context& context, const ExpertShape& shape, const ExpertWeights& weights,
                      const Inbox& inbox, const Inbox& dout, const Outbox& y, const ExpertsRecord& record,
                      const ExpertGradients& gradients, Outbox* dx, Outbox& dweights, ExpertsScratch& scratch);

}  // namespace expar
