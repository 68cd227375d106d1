// Ascend's operators that turn experts into their instances, where an expert has several.
#pragma once

#include <cstdint>

#include <expar/tensor.h>

namespace expar::ascend {

/// Which instance of its expert each slot goes to.
///   expert_ids    : [BS, K]  int32 or int64, experts from 0 to E - 1
///   eplb_table    : [E, F]   int32; row e is the number of its instances c, then the c instances, then what is ignored
///   local_rank_id : r, this rank of the world_size W
///   balance_mode  : 0  instance r / ceil(W / c): by rank. Where c does not divide W, the last instances may stay idle
///                   1  instance t % c of row t: by token
///                   2  instance floor(r c / W): by rank, as evenly as can be. expar's own
///   returns       : [BS, K]  dtype of expert_ids, instances: the expert_ids of the dispatch that follows
/// Not collective: each rank needs only its own rows.
/// Throws Error: bad_argument, naming the parameter, the value and its range: BS from 1 to 512, K from 1 to 16 and not
/// above E, E from 1 to 512, W from 2 to 384, F from 2 to W + 1, c from 1 to F - 1, instances from 0 to 1023 and each
/// once in the table.
/// Cost: one pass over the table and the ids. Source: npu_moe_eplb_update_expert.
Array moe_eplb_update_expert(ConstTensor expert_ids, ConstTensor eplb_table, std::int64_t local_rank_id,
                             std::int64_t world_size, std::int64_t balance_mode = 0);

struct UpdateExpertOptions {
  ConstTensor expert_scales = {};      // [BS, K] f32, bf16 or f16, descending in each row; with pruning_threshold
  ConstTensor pruning_threshold = {};  // [K] or [1, K] f32
  ConstTensor active_mask = {};        // [BS] int8, ones before zeros; only with the two above
  std::int64_t local_rank_id = -1;     // needed but in balance_mode 1
  std::int64_t world_size = -1;        // likewise
  std::int64_t balance_mode = 0;       // as above
};

struct UpdatedExperts {
  Array balanced_expert_ids;   // [BS, K] dtype of expert_ids
  Array balanced_active_mask;  // [BS, K] int8: the slots that are left; without pruning all
};

/// moe_eplb_update_expert, which also drops slots that count little: of token t, where the mask has it, slot k stays if
///   expert_scales[t, k] >= pruning_threshold[k] * sum_j expert_scales[t, j]   (f32, summed from j = 0 on)
/// All ids are updated, those of dropped slots too. The mask is the x_active_mask of the dispatch that follows.
/// Not collective. Throws Error: bad_argument, as above with E up to 1024 and W up to 768; scales that ascend or are
/// not finite; a mask that has ones after zeros; one of the three inputs without those it needs.
/// Source: npu_moe_update_expert.
UpdatedExperts moe_update_expert(ConstTensor expert_ids, ConstTensor eplb_table,
                                 const UpdateExpertOptions& options = {});

}  // namespace expar::ascend
