// The split-phase operators npu_moe_distribute_{dispatch,combine}_{setup,teardown} of torch_npu, on any machine.
//
//   dispatch_setup -> own work -> dispatch_teardown -> experts -> combine_setup -> own work -> combine_teardown
//
// A setup posts what this rank sends and returns at once; its teardown waits for what the others have posted, and
// unpacks. Names, shapes and orders are those of the torch_npu pages; docs/ascend.md lists every parameter, and where
// expar differs on purpose. group_ep is the context: its size is ep_world_size, its rank ep_rank_id. Outputs are the
// caller's memory, of the shapes that domain.h gives. All are collective: every rank of the domain calls all four in
// this order, with the same domain, K, H, dtypes and modes.
//
// An argument of a setup that is wrong on one rank is an error of the teardown on every rank, since a setup waits for
// nobody; the domain is as good as before. What is wrong with a teardown's own arguments is thrown on that rank alone,
// after all rows have come.
// Throws Error, all teardowns: bad_argument (naming the parameter, its value and its range), mismatch, timeout,
// peer_lost.
#pragma once

#include <expar/ascend/domain.h>
#include <expar/context.h>
#include <expar/dispatch.h>

namespace expar::ascend {

/// What a setup has posted, for its teardown: the pages' opaque comm_cmd_info. Move-only. One that is dropped before
/// ends the job.
class CommCmdInfo {
 public:
  CommCmdInfo() = default;
  /// For the library's own use.
  CommCmdInfo(PendingDispatch posted, std::vector<NamedNumber> numbers)
      : posted_(std::make_unique<PendingDispatch>(std::move(posted))), numbers_(std::move(numbers)) {}
  /// For the library's own use. Waits for the rows of all ranks. Throws Error: bad_argument (nothing was posted, or it
  /// was taken before).
  Inbox take();
  /// Throws Error: bad_argument (a number is not the setup's; names it).
  void check(std::span<const NamedNumber> numbers) const;

 private:
  std::unique_ptr<PendingDispatch> posted_;
  std::vector<NamedNumber> numbers_;
};

struct DispatchSetup {
  ConstTensor x;           // [BS, H] f16 or bf16: this rank's tokens
  ConstTensor expert_ids;  // [BS, K] int32 in [0, E), different ones in a row
  /// Smooth scales [SN + E, H] f32, those of shared experts first, or [E, H] where no rank holds one; absent: 1. With
  /// quant_mode 1, where it is needed, [1], [H] or as that.
  ConstTensor scales = {};
  /// [BS] int8, 1s before 0s; absent: all ones. As many tokens travel as there are ones.
  ConstTensor x_active_mask = {};
  std::int64_t quant_mode = 0;  // 0 none, 1 static, 2 per token, 3 per 128 values, 4 MX: powers of two per 32 values
  std::optional<DType> y_dtype = {};  // of quantised values; absent: int8 of modes 1 and 2, fp8_e4m3 of 3 and 4
};

/// Quantises the rows of x into y and posts them.
///   y          : [BS (K + SN), message_bytes / size of an element] of x's dtype or, quantised, y_dtype. Row t K + k is
///                the copy of token t for its slot k; row BS K + j active + t that for shared expert j. It must stay
///                as it is until the teardown
///   expand_idx : [BS K] int32: how many slots before this one, on this rank, chose the same expert
/// Cost: one read and one write of each row; one more write to where the others read it.
CommCmdInfo moe_distribute_dispatch_setup(const Context& group_ep, const Domain& domain, const DispatchSetup& in,
                                          Tensor y, Tensor expand_idx);

struct DispatchTeardown {
  ConstTensor x, y, expert_ids;  // these three as in the setup
  std::int64_t quant_mode = 0;
  std::optional<DType> y_dtype = {};
  std::int64_t expert_token_nums_type = 1;  // 0: rows up to and with each expert; 1: of each
};

/// Rows past those that arrived are left as they are.
struct Dispatched {
  /// [A, H] of x's dtype, or y_dtype. Local expert by local expert, in each by source rank, in each by token and slot.
  Tensor expand_x;
  /// x = q * scale. Mode 2 f32 [A]; 3 f32 [A, ceil(H / 128)]; 4 fp8_e8m0 [A, ceil(H / 32) made even]; else absent.
  Tensor dynamic_scales = {};
  /// [A 128] int32: rows from sources up to and with s for local experts up to and with e, at e W + s.
  Tensor assist_info_for_combine;
  Tensor expert_token_nums;  // [LE] int64
};

/// Waits until the rows of all ranks are there and unpacks them. Cost: one read and two writes of each row.
void moe_distribute_dispatch_teardown(const Context& group_ep, const Domain& domain, const DispatchTeardown& in,
                                      CommCmdInfo comm_cmd_info, const Dispatched& out);

struct CombineSetup {
  ConstTensor expand_x;                 // [A, H] f16 or bf16: results, in the order of Dispatched::expand_x
  ConstTensor expert_ids;               // [BS, K]
  ConstTensor assist_info_for_combine;  // [A 128]
  std::int64_t comm_quant_mode = 0;     // 0: rows travel as they are; 2: as int8 with a scale per 8 values
};

/// Posts each result to where its row came from. expand_x must stay as it is until the teardown.
///   quant_expand_x : [A, quant_expand_bytes(H)] int8: the rows as they travel, with comm_quant_mode 2; else untouched
CommCmdInfo moe_distribute_combine_setup(const Context& group_ep, const Domain& domain, const CombineSetup& in,
                                         Tensor quant_expand_x);

struct CombineTeardown {
  ConstTensor expand_x, quant_expand_x, expert_ids;  // those of the setup
  ConstTensor expand_idx;                            // from dispatch_setup
  ConstTensor expert_scales;                         // [BS, K] f32: the router's weights
  ConstTensor x_active_mask = {};                    // that of dispatch_setup
  ConstTensor shared_expert_x = {};                  // [BS, H] of x's dtype, only with shared_expert_num 0; or absent
  std::int64_t comm_quant_mode = 0;
};

/// out[t] = sum over k of expert_scales[t, k] * the result of (t, k), in the order of k, then the results of the shared
/// experts, then shared_expert_x; in f32, rounded once. A token that is not active gets shared_expert_x or zeros.
///   out : [BS, H] of expand_x's dtype
void moe_distribute_combine_teardown(const Context& group_ep, const Domain& domain, const CombineTeardown& in,
                                     CommCmdInfo comm_cmd_info, Tensor out);

}  // namespace expar::ascend
