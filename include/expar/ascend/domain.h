// What every operator of an expert-parallel domain is told alike, and the sizes that follow from it.
//
// Names and ranges are those of the torch_npu pages. A few ranks hold a shared expert each, all others `local experts`
// of the MoE; a token visits one rank of every shared expert besides its K experts.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include <expar/tensor.h>

namespace expar::ascend {

/// The same on all ranks, but for ep_rank_id.
struct Domain {
  std::int64_t ep_world_size = 0;           // W, [2, 384]
  std::int64_t ep_rank_id = 0;              // [0, W)
  std::int64_t moe_expert_num = 0;          // E, (0, 512], a multiple of W - shared_expert_rank_num
  std::int64_t expert_shard_type = 0;       // 0: the ranks of shared experts come first
  std::int64_t shared_expert_num = 1;       // SN, [0, 4]
  std::int64_t shared_expert_rank_num = 0;  // SR, [0, W / 2], a multiple of SN; 0: no rank holds a shared expert
  std::int64_t global_bs = 0;      // 0 where all ranks have as many tokens, or W times the most tokens of any rank
  std::int64_t comm_type = 0;      // 0: the pages' AICPU-SDMA
  std::string_view comm_alg = {};  // reserved: empty

  bool holds_shared(std::int64_t rank) const { return rank < shared_expert_rank_num; }
  /// LE: of a rank that holds experts of the MoE.
  std::int64_t experts_per_rank() const { return moe_expert_num / (ep_world_size - shared_expert_rank_num); }
  std::int64_t local_expert_num(std::int64_t rank) const { return holds_shared(rank) ? 1 : experts_per_rank(); }
  /// The ranks that hold one and the same shared expert; 0 where none does.
  std::int64_t ranks_per_shared_expert() const {
    return shared_expert_rank_num == 0 ? 0 : shared_expert_rank_num / shared_expert_num;
  }
  /// The rank that runs shared expert `expert` for the tokens of `source`.
  std::int64_t shared_rank(std::int64_t expert, std::int64_t source) const {
    return expert * ranks_per_shared_expert() + source % ranks_per_shared_expert();
  }
  /// The most tokens of any rank, where this one has `bs`.
  std::int64_t max_bs(std::int64_t bs) const { return global_bs == 0 ? bs : global_bs / ep_world_size; }

  /// Throws Error: bad_argument, naming the first value out of its range, and the range.
  void check() const;
};

/// assist_info_for_combine has so many numbers for each row of expand_x.
inline constexpr std::int64_t kInfoPerRow = 128;

/// The sizes below are those of a domain that check() passes.
///
/// A: rows of expand_x on `rank`. Of a shared expert's rank: those of all sources that it serves, max_bs each (the
/// pages' formula where the ranks of a shared expert divide W, and enough where they do not). Else max_bs W min(LE, K),
/// or more where assist_info_for_combine needs it.
std::int64_t expand_rows(const Domain& domain, std::int64_t rank, std::int64_t bs, std::int64_t k);

/// Bytes of a dispatched row of H values of dtype `x`: its values, then its scales, from a multiple of 32 on;
/// altogether a multiple of 512. Modes and y_dtype as in moe_distribute_dispatch_setup. Throws Error: bad_argument (no
/// such mode, or not of this y_dtype).
std::int64_t message_bytes(std::int64_t h, DType x, std::int64_t quant_mode, std::optional<DType> y_dtype = {});

/// Elements of a row of y as the page gives them, for programs that will run on the device; expar's own rows are
/// message_bytes. Throws Error: bad_argument (quant_mode not from 0 to 4).
std::int64_t token_msg_size(std::int64_t h, std::int64_t quant_mode);

/// Bytes of a row of quant_expand_x: H int8 and a scale for each 8 of them.
std::int64_t quant_expand_bytes(std::int64_t h);

/// What the pages ask HCCL_BUFFSIZE to be, in bytes. expar takes what it needs and looks at no such variable; this is
/// for programs that will run on the device.
///   bs : tokens of this rank; with global_bs any
std::int64_t hccl_buffer_bytes(const Domain& domain, std::int64_t bs, std::int64_t h, std::int64_t k);
/// The least HCCL_BUFFSIZE, in megabytes: 2, or as many as that takes.
std::int64_t hccl_buffsize(const Domain& domain, std::int64_t bs, std::int64_t h, std::int64_t k);
/// Throws Error: bad_argument (a size out of the pages' ranges; a buffer of so many megabytes is too small, with what
/// is needed).
void check_hccl_buffer(const Domain& domain, std::int64_t bs, std::int64_t h, std::int64_t k, std::int64_t megabytes);

}  // namespace expar::ascend
