// The operators npu_moe_distribute_{dispatch,combine}_v2 and combine_add_rms_norm of torch_npu, on any machine:
// dispatch and combine in one phase each, with slots masked one by one, experts that need no rank, groups of
// tensor-parallel ranks, and ranks that are out.
//
// As distribute.h, but for: errors of a rank are thrown on every rank by the call itself, except that results which are
// not those of expert_ids are found by the rank that they came to; W to 768, E to 1024, and any
// number of ranks but all may hold shared experts. comm_alg may be any of "", "fullmesh", "fullmesh_v1", "fullmesh_v2"
// and "hierarchy": all give the same bytes here.
#pragma once

#include <expar/ascend/domain.h>
#include <expar/context.h>

namespace expar::ascend {

/// What dispatch_v2 and combine_v2 are told alike.
struct V2Options {
  /// The ranks with the same experts and other tokens, whose rows all of them get; tp_world_size 0 or 1: none. Only
  /// with one expert on each rank.
  const Context* group_tp = nullptr;
  std::int64_t tp_world_size = 0;  // 0, 1 or 2
  std::int64_t tp_rank_id = 0;
  /// [BS] int8, 1s before 0s; or [BS, K], slots that count, in any pattern: a token with none visits no shared expert.
  ConstTensor x_active_mask = {};
  /// [4 + 2 W] int32: whether ranks are out; how many are left, how many of those hold shared experts, E of those;
  /// [W] each rank's number among those left, or -1; [W] the rank of each number. group_ep has those left alone.
  ConstTensor elastic_info = {};
  /// [W] int64: microseconds that this rank waited for each source are added to it. On all ranks or none; the ranks
  /// share the clock of one host.
  Tensor performance_info = {};
  /// Experts that need no rank: ids from E on, zeros, then copies, then constants. Their slots do not travel.
  std::int64_t zero_expert_num = 0, copy_expert_num = 0, const_expert_num = 0;
};

struct DispatchV2 {
  ConstTensor x;                   // [BS, H] f16 or bf16
  ConstTensor expert_ids;          // [BS, K] int32
  ConstTensor scales = {};         // as DispatchSetup
  ConstTensor expert_scales = {};  // [BS, K] f32: travel beside the rows; absent: they do not
  std::int64_t quant_mode = 0;
  std::optional<DType> y_dtype = {};
  std::int64_t expert_token_nums_type = 1;
};

/// As Dispatched, but: with TP expand_x [tp A, H] and dynamic_scales [tp A, ...] have the rows of all tp ranks, in
/// their order.
struct DispatchedV2 {
  Tensor expand_x;
  Tensor dynamic_scales = {};
  /// [A 128] int32: at 3 i the source, the token and the slot of row i, K + j where it went to shared expert j.
  Tensor assist_info_for_combine;
  Tensor expert_token_nums;    // [LE] int64
  Tensor ep_recv_counts;       // [LE W max(tp, 1)] int32: rows summed up to and with each source of each expert
  Tensor tp_recv_counts = {};  // [tp] int32 rows of each tp rank; without TP absent
  Tensor expand_scales = {};   // [A] f32: expert_scales of each row; absent without
};

/// Collective over group_ep, and over group_tp. Throws Error: bad_argument, mismatch, timeout, peer_lost.
/// Cost: that of both phases in distribute.h; with TP one all-gather of the rows.
void moe_distribute_dispatch_v2(const Context& group_ep, const Domain& domain, const V2Options& options,
                                const DispatchV2& in, const DispatchedV2& out);

struct CombineV2 {
  ConstTensor expand_x;        // [A, H] f16 or bf16; with TP [tp A, H]: a part of the result of each row
  ConstTensor expert_ids;      // [BS, K]
  ConstTensor ep_send_counts;  // dispatch's ep_recv_counts
  ConstTensor assist_info_for_combine = {}, expand_scales = {};  // dispatch's; not needed here, and not read
  ConstTensor tp_send_counts = {};                               // dispatch's tp_recv_counts
  ConstTensor expert_scales = {};                                // [BS, K] f32; absent: 1
  ConstTensor shared_expert_x = {};                              // [BS, H], without ranks of shared experts
  ConstTensor ori_x = {};  // [BS, H]: what copy experts give back, and constants mix with
  ConstTensor const_expert_alpha_1 = {}, const_expert_alpha_2 = {}, const_expert_v = {};  // [constants, H]
  std::int64_t comm_quant_mode = 0;                                                       // as CombineSetup
};

/// out[t] = the sum of distribute.h's combine; a copy expert's result is ori_x[t], a constant one's a1 ori_x[t] + a2 v,
/// with (a1, a2) = softmax(<alpha_1, ori_x[t]>, <alpha_2, ori_x[t]>). Slots that are masked count nothing.
///   out : [BS, H] of expand_x's dtype
/// With TP the tp ranks' parts of a result are summed first, in their order, in f32, and rounded.
/// Collective, Throws and Cost as dispatch_v2.
void moe_distribute_combine_v2(const Context& group_ep, const Domain& domain, const V2Options& options,
                               const CombineV2& in, Tensor out);

struct CombineAddRmsNorm {
  ConstTensor residual_x;  // [BS, 1, H] bf16, added last, before x is rounded
  ConstTensor gamma;       // [H] bf16
  float norm_eps = 1e-6F;
};

/// x = combine_v2 + residual_x, rounded once; rstd = 1 / sqrt(mean(x^2) + norm_eps); y = gamma (x rstd), each product
/// rounded. bf16 alone.
///   y, x : [BS, 1, H]    rstd : [BS, 1, 1] f32
void moe_distribute_combine_add_rms_norm(const Context& group_ep, const Domain& domain, const V2Options& options,
                                         const CombineV2& in, const CombineAddRmsNorm& norm, Tensor y, Tensor rstd,
                                         Tensor x);

}  // namespace expar::ascend
