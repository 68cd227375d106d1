// The communication buffer that Ascend's split-phase dispatch and combine ask for, and which sizes they take.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace expar::planner {

struct AscendSizes {
  std::int64_t ranks = 1;           // ep_world_size
  std::int64_t tokens = 0;          // max_bs, of each rank
  std::int64_t hidden = 0;          // H
  std::int64_t experts = 0;         // moe_expert_num; without a rank that is for shared experts alone
  std::int64_t topk = 0;            // K
  std::int64_t shared_experts = 1;  // shared_expert_num; 1 is the operators' own default
};

/// Bytes of the window of one communication domain, at the least; HCCL_BUFFSIZE counts it in MB, 200 where it is unset.
///   2 (L max_bs P Align512(Align32(2 H) + 44) + (K + shared) max_bs Align512(2 H)),  AlignN(x) = ceil(x / N) N
/// with L the experts of the rank that has most.
/// Source: the page of torch_npu.npu_moe_distribute_combine_setup, HCCL_BUFFSIZE.
std::int64_t ascend_buffer_bytes(const AscendSizes& sizes);

/// What the operators refuse of these sizes, a sentence each.
/// Source: the same page, its ranges of parameters.
std::vector<std::string> ascend_refusals(const AscendSizes& sizes);

}  // namespace expar::planner
