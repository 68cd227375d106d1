// A byte-level language model with expert-parallel MoE blocks; everything outside of the experts is data parallel.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <expar/layer.h>
#include <expar/parallel.h>

#include "models/batch.h"
#include "models/embedding.h"

namespace expar {

struct TextModelOptions {
  std::int64_t context = 12;  // C, bytes before the target
  std::int64_t layers = 2;
  /// Of every layer: H, F, E, K, and the dtype of activations and weights.
  MoeLayerOptions moe{.hidden = 128, .inner = 256, .router = {.experts = 16, .topk = 2, .balance = 0.01F, .z = 0.001F}};
};

/// Throws Error: bad_argument (an extent below 1, K > E, a dtype that layers do not have), naming the value.
void validate(const TextModelOptions& options);

/// The same model with nothing to choose: one expert of inner size K F, and that of the shared ones, that takes every
/// token, so that as many parameters work on each token.
TextModelOptions dense_twin(TextModelOptions options);

/// context [C] -> embedding [H] -> layers of x + moe(norm(x)) -> norm -> head [256, H] -> logits [256]
/// Losses, gradients and parameters are the same bytes for every number of ranks and threads and every transport. With
/// experts in slices they differ by the rounding of the sum over these; with replicas each balances its own tokens, and
/// a capacity is that of one replica's.
class TextModel {
 public:
  /// Draws every parameter by its name; the head begins at zero, so that the first loss is log 256.
  /// Collective over all ranks of `ranks`, as all that follows; contexts that follow are ranks.data.
  /// Throws Error: as validate(), no_memory.
  TextModel(const Parallel& ranks, const TextModelOptions& options, std::uint64_t seed);

  const TextModelOptions& options() const { return options_; }

  /// The batch's mean cross-entropy in nats; leaves the gradients of it plus the routers' losses in parameters().
  ///   batch    : the whole of it, on every rank
  ///   sharding : this rank's tokens of it
  /// Collective. Throws Error: as MoeLayer.
  /// Cost: forward and backward of each layer, one all_reduce of [S_r, N] per dense parameter, one all_gather of [B,
  /// H].
  float train(const Context& context, const Batch& batch, const Sharding& sharding);

  /// Adds to `nats` [S_r] the cross-entropy of this rank's shards, summed over their tokens. Collective.
  void evaluate(const Context& context, const Batch& batch, const Sharding& sharding, std::span<double> nats);

  /// What this rank trains: always the same, in the same order. Call gather() after they have changed.
  std::vector<Parameter> parameters();
  /// Brings every rank's part of the embedding to all. Collective. Cost: one read of the table per rank.
  void gather(const Context& context);
  /// Refreshes all low-precision copies after values were written by hand; gathers. Collective.
  void refresh(const Context& context);

  /// [E] of each layer, see MoeLayer; absent where the router has none.
  Tensor selection_bias(std::size_t layer) { return blocks_[layer].moe.selection_bias(); }
  /// One step of every selection bias by the loads of the last trained batch; call it once per optimizer step.
  void follow_loads(float rate);

  /// [layers, E] rows that each expert took of the last trained batch, and how many slots none took for want of room.
  std::span<const std::int64_t> loads() const { return loads_; }
  std::int64_t dropped() const { return dropped_; }

  /// Milliseconds since the last call; `backward` is the whole backward pass with its reductions.
  PhaseTimes take_times();

 private:
  /// A norm with what it read and wrote, [T, H], and its [T] scales.
  struct Norm {
    Buffer x_memory, y_memory, scale_memory;
    Tensor x, y, scale;
  };
  struct Block {
    MoeLayer moe;
    std::vector<Parameter> dense;
    MoeRecord record;
  };
  enum class Pass : std::uint8_t { training, inference };

  void forward(const Context& context, const Batch& batch, const Sharding& sharding, Pass pass);
  RmsNorm norm_to(std::size_t index) const;
  void predict(const Context& context);
  double nats_of(const Batch& batch, const Sharding& sharding, std::int64_t shard) const;
  void backward(const Context& context, const Batch& batch, const Sharding& sharding);
  Tensor head_backward(const Context& context, const Batch& batch, const Sharding& sharding);
  void norm_backward(const Context& context, std::size_t index, ConstTensor dy, ConstTensor residual,
                     const Sharding& sharding, Tensor dx);
  void sum_expert_gradients();
  std::vector<std::int64_t> over_replicas(std::span<const std::int64_t> counts) const;
  void count_loads();
  Parameter head_parameter();

  std::int64_t hidden() const { return options_.moe.hidden; }
  DType dtype() const { return options_.moe.dtype; }
  Tensor gain(std::size_t norm) const { return gains_.view().rows(static_cast<std::int64_t>(norm), 1); }
  ConstTensor head() const { return head_low_ ? head_low_ : head_; }
  /// The gradients of all gains and the loss stand side by side, so that one all_reduce serves them.
  std::int64_t gains_and_loss() const { return gains_.view().elements() + 1; }

  TextModelOptions options_;
  Parallel ranks_;
  Embedding embedding_;
  std::vector<Block> blocks_;
  std::vector<Norm> norms_;             // one before each block and one before the head
  Array gains_, dgains_and_loss_;       // [layers + 1, H], its gradient and the loss
  Array head_, head_low_, dhead_;       // [256, H]
  Tensor logits_, scores_, logsumexp_;  // [T, 256], [T, 256], [T]
  Buffer logits_memory_, scores_memory_, logsumexp_memory_, chosen_, top_;
  Buffer dlogits_, dnormed_, dx_;
  Buffer head_rows_;  // [S_r, 256, H]
  Tensor gain_rows_;  // [S_r, gains_and_loss()]
  Buffer gain_rows_memory_;
  Buffer replica_sum_;
  std::vector<std::int64_t> loads_;
  std::int64_t dropped_ = 0;
  double backward_ms_ = 0;
};

}  // namespace expar
