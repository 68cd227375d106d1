// Ascend's routers, from logits to experts and weights.
#pragma once

#include <cstdint>

#include <expar/context.h>

namespace expar::ascend {

struct SoftmaxGating {
  Array y;           // [N, k] dtype of x: the chosen scores, best first
  Array expert_idx;  // [N, k] int32, ties to the lower expert
  Array row_idx;     // [N, k] int32: [n, j] is j N + n, the row_idx of moe_init_routing
};

/// The k largest of softmax(x), the softmax over all experts.
///   x        : [N, E]  f32, bf16 or f16
///   finished : [N]     int8 or absent; where it is not 0 every expert_idx is E, which is no expert
/// Not collective. Throws Error: bad_argument (shapes, dtypes, k not from 1 to E). Cost: one pass over x.
/// Source: npu_moe_gating_top_k_softmax.
SoftmaxGating moe_gating_top_k_softmax(const Context& context, ConstTensor x, ConstTensor finished = {},
                                       std::int64_t k = 1);

struct GatingOptions {
  ConstTensor bias = {};               // [E] f32, bf16 or f16, added to the scores for the choice alone
  ConstTensor input_ids = {};          // [N] int32 or int64: with tid2eid tokens go where the table says
  ConstTensor tid2eid = {};            // [V, k] int32 or int64, the experts of each token id
  std::int64_t k_group = 1;            // a token chooses among its k_group best
  std::int64_t group_count = 1;        // groups of E / group_count experts
  std::int64_t group_select_mode = 0;  // a group is as good as 0: its best, 1: the sum of its two best
  std::int64_t renorm = 0;             // 1: divide the chosen scores by their sum + eps; norm_type 1 does anyway
  std::int64_t norm_type = 0;          // score 0: softmax over all experts, 1: sigmoid
  bool out_flag = false;               // return the scores too
  float routed_scaling_factor = 1;     // the weights are multiplied by it at last
  float eps = 1e-20F;
};

struct Gating {
  Array y;           // [N, k] dtype of x: weights, best first
  Array expert_idx;  // [N, k] int32, ties to the lower expert
  Array out;         // [N, E] f32 scores; with out_flag
};

/// The k largest scores and biases in a token's best groups, and their weights, all in f32.
///   x : [N, E]  f32, bf16 or f16
/// Not collective. Throws Error: bad_argument (shapes, dtypes, an option out of its range, k not from 1 to the experts
/// of k_group groups, an id outside of its table; with tid2eid also a bias or groups).
/// Cost: one pass over x. Source: npu_moe_gating_top_k.
Gating moe_gating_top_k(const Context& context, ConstTensor x, std::int64_t k, const GatingOptions& options = {});

}  // namespace expar::ascend
