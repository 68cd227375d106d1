// Ascend's operators that bring rows into the order of their experts, and back into that of their tokens.
#pragma once

#include <cstdint>

#include <expar/context.h>

namespace expar::ascend {

struct TokenPermutation {
  Array permuted_tokens;  // [rows, H] dtype of tokens
  Array sorted_indices;   // [N K] int32: the place of each slot among all sorted ones, dropped ones included
};

/// A row for each slot, sorted by `indices`; slots of equal index keep their order.
///   tokens         : [N, H]  of any dtype
///   indices        : [N, K] or [N]  int32 or int64, the experts of each token
///   num_out_tokens : rows that are kept, of the first; 0 all; below 0 all but so many
/// Not collective. Throws Error: bad_argument (shapes, dtypes, more than 2^31 - 1 slots). Cost: a sort of the slots and
/// one copy of the rows. Source: npu_moe_token_permute.
TokenPermutation moe_token_permute(ConstTensor tokens, ConstTensor indices, std::int64_t num_out_tokens = 0);

/// The gradient of the tokens: the sum of those of their rows, in f32, rounded once.
///   permuted_tokens_grad : [rows, H]  f32 or bf16
///   sorted_indices       : [N K]      int32, of moe_token_permute
///   returns              : [num_tokens, H]
/// Not collective. Throws Error: bad_argument (shapes, dtypes, indices that are not each of 0 to N K - 1 once).
Array moe_token_permute_grad(const Context& context, ConstTensor permuted_tokens_grad, ConstTensor sorted_indices,
                             std::int64_t num_tokens);

/// out[n] = sum_k probs[n, k] * permuted_tokens[sorted_indices[n K + k]], in f32, rounded once; dropped rows are zero.
///   permuted_tokens : [rows, H]  f32 or bf16
///   sorted_indices  : [N K]      int32 from 0 to N K - 1, of moe_token_permute or another; from `rows` on: dropped
///   probs           : [N, K]     f32, bf16 or f16; absent: K is 1 and each weight is one
///   returns         : [N, H]     dtype of permuted_tokens
/// Not collective. Throws Error: bad_argument (shapes, dtypes, an index out of its range).
/// Cost: one read of the rows. Source: npu_moe_token_unpermute.
Array moe_token_unpermute(const Context& context, ConstTensor permuted_tokens, ConstTensor sorted_indices,
                          ConstTensor probs = {});

struct TokenUnpermuteGrad {
  Array permuted_tokens_grad;  // [rows, H] dtype of permuted_tokens
  Array probs_grad;            // [N, K] dtype of probs; none without probs
};

/// The gradients of moe_token_unpermute. unpermuted_tokens_grad : [N, H] dtype of permuted_tokens; the rest as above.
/// Not collective. Throws Error: bad_argument (shapes, dtypes, indices that are not each of 0 to N K - 1 once).
/// Cost: one read of both kinds of rows, one write of one.
TokenUnpermuteGrad moe_token_unpermute_grad(const Context& context, ConstTensor unpermuted_tokens_grad,
                                            ConstTensor permuted_tokens, ConstTensor sorted_indices,
                                            ConstTensor probs = {});

struct ReRoutingOptions {
  ConstTensor per_token_scales = {};       // [A] or [A, S] of any dtype, moved with their rows
  std::int64_t expert_token_num_type = 1;  // 1 counts, 0 their sums so far
  std::int64_t idx_type = 0;  // 0: permute_token_idx has the old place of each row, 1: the new place of each old one
};

struct ReRouting {
  Array permute_tokens;            // [A, H] dtype of tokens
  Array permute_per_token_scales;  // shape and dtype of the scales; none without them
  Array permute_token_idx;         // [A] int32
  Array expert_token_num;          // [E] dtype of expert_token_num_per_rank
};

/// Rows that stand rank by rank and expert by expert in each, brought expert by expert and rank by rank in each.
///   tokens                    : [A, H]  of any dtype
///   expert_token_num_per_rank : [ranks, E]  int32 or int64, whose sum is A
/// Not collective. Throws Error: bad_argument (shapes, dtypes, counts below 0 or of another sum, an option out of its
/// range). Cost: one copy of the rows. Source: npu_moe_re_routing; it is expert_major and permute_rows of permute.h.
ReRouting moe_re_routing(ConstTensor tokens, ConstTensor expert_token_num_per_rank,
                         const ReRoutingOptions& options = {});

struct FinalizeRoutingInputs {
  ConstTensor expanded_permuted_rows;      // [rows, H], or [E, C, H] with drop_pad_mode 1 and 3; f32, bf16 or f16
  ConstTensor skip1 = {};                  // [N, H] dtype of the rows, added
  ConstTensor skip2 = {};                  // likewise; only with skip1
  ConstTensor bias = {};                   // [E, H] dtype of the rows: of expert_for_source_row, added to each row
  ConstTensor scales = {};                 // [N, K] f32, bf16 or f16; absent: K is 1 and each weight is one
  ConstTensor expanded_src_to_dst_row;     // [N K] int32: the row of each slot; -1, and rows beyond the last with
                                           // drop_pad_mode 0 and 2: none
  ConstTensor expert_for_source_row = {};  // [N, K] int32; with bias
  std::int64_t drop_pad_mode = 0;          // 0, 1: slot (n, k) is the (k N + n)th; 2, 3: the (n K + k)th
};

/// out[n] = skip1[n] + skip2[n] + sum_k scales[n, k] * (rows[row of (n, k)] + bias[expert of (n, k)])
/// in this order, in f32, rounded once. A slot without a row adds nothing.
///   returns : [N, H]  dtype of the rows
/// Not collective. Throws Error: bad_argument (shapes, dtypes, a row or expert that is not there).
/// Cost: one read of the rows. Source: npu_moe_finalize_routing.
Array moe_finalize_routing(const Context& context, const FinalizeRoutingInputs& inputs);

/// Rows of experts up to each: out[e] counts the elements that are not above e.
///   sorted_expert_for_source_row : [M]  int32, ascending from 0 on; from num_expert on they count nowhere
///   returns                      : [num_expert] int32
/// Not collective. Throws Error: bad_argument. Source: npu_moe_compute_expert_tokens.
Array moe_compute_expert_tokens(ConstTensor sorted_expert_for_source_row, std::int64_t num_expert);

}  // namespace expar::ascend
