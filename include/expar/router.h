// Chooses K experts per token and says how much each counts.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <expar/context.h>

namespace expar {

/// What to do with a logit that is NaN or infinite.
enum class NanPolicy : std::uint8_t { error, propagate };

struct RouterOptions {
  std::int64_t experts = 0;  // E
  std::int64_t topk = 0;     // K <= E
  /// Divide the K chosen scores by their sum. Off: the plain softmax scores.
  bool renormalise = true;
  float balance = 0.0F;  // coefficient of the balancing loss; 0.01 is usual
  float z = 0.0F;        // coefficient of the z-loss; 0.001 is usual
  NanPolicy nan = NanPolicy::error;
};

/// Throws Error: bad_argument (E < 1, K < 1, K > E, a negative coefficient), naming the value.
void validate(const RouterOptions& options);

/// What the router decided for T tokens, and what its backward pass needs. Reuse one object: it keeps its memory.
struct Routing {
  Tensor ids;        // [T, K] int32, descending score, ties to the lower expert
  Tensor weights;    // [T, K] f32
  Tensor scores;     // [T, E] f32, softmax of the logits
  Tensor top;        // [T, K] f32, the chosen scores before renormalisation
  Tensor logsumexp;  // [T] f32
  Buffer memory;
};

/// Softmax over E, then the K largest (Shazeer et al. 2017; Fedus et al. 2021).
///   logits  : [T, E] f32, this rank's tokens
/// Not collective. Throws Error: bad_argument (shape or dtype; with nan = error also "logits[3,5] is nan").
/// Cost: one pass over the logits.
void route(const Context& context, const RouterOptions& options, ConstTensor logits, Routing& routing);

/// Over the global batch of T tokens, c_i of whose T K slots went to expert i:
///   balance = coefficient * E * sum_i (c_i / (T K)) * mean_t score[t, i]         (Fedus et al. 2021, eq. 4)
///   z       = coefficient * mean_t logsumexp[t]^2                                (Zoph et al. 2022, eq. 5)
struct RouterLosses {
  float balance = 0.0F;
  float z = 0.0F;
  std::int64_t tokens = 0;           // T of the global batch
  std::vector<float> load_fraction;  // [E] c_i / (T K)

  // The gradient of all that, as route_backward reads it. Most losses are linear in a score, so that all tokens of a
  // segment have the same gradient.
  std::vector<std::int64_t> segments;  // [n + 1] ascending from 0 to this rank's tokens; empty: no losses by scores
  std::vector<float> dscores;          // [n, E] by a score of a token of the segment
  float dlogsumexp = 0.0F;             // by a token's logsumexp, over that logsumexp
};

/// `shards` splits this rank's tokens into the micro-shards of the global batch: [S + 1] ascending from 0 to T. Means
/// are summed shard by shard over all ranks, so that they do not depend on which rank holds a shard.
///   counts : [E] slots per expert over the global batch (Plan::expert_totals)
/// Collective.
RouterLosses router_losses(const Context& context, const RouterOptions& options, const Routing& routing,
                           std::span<const std::int64_t> counts, std::span<const std::int64_t> shards);

/// dlogits [T, E] f32 of (weights . dweights) + losses: their segments, dscores and dlogsumexp.
///   dweights : [T, K] f32, the gradient of the weights; 0 where a slot was dropped
/// Not collective.
void route_backward(const Context& context, const RouterOptions& options, const Routing& routing,
                    const RouterLosses& losses, ConstTensor dweights, Tensor dlogits);

}  // namespace expar
