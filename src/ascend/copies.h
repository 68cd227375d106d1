// The copies of its tokens that a rank sends: one for each slot, and one for each shared expert.
#pragma once

#include <cstdint>
#include <vector>

#include <expar/ascend/domain.h>

namespace expar::ascend {

/// Experts are numbered over all ranks here: those of the ranks of shared experts, one each, then those of the MoE.
std::int64_t experts_of(const Domain& domain);
/// [W + 1] where each rank's begin.
std::vector<std::int64_t> first_experts_of(const Domain& domain);

/// In the order of y: (token, slot) by (token, slot), then shared expert by shared expert the tokens that travel; with
/// a mask of slots all tokens.
struct Copies {
  std::int64_t tokens = 0, topk = 0, shared = 0;  // BS, K, and SN where ranks hold shared experts
  std::int64_t shared_step = 0;                   // copies for each shared expert
  std::vector<std::int8_t> counted;               // [BS K] slots that no mask takes away
  std::vector<std::int8_t> active;                // [BS] tokens with such a slot
  std::vector<std::int32_t> expert;               // [BS (K + SN)] or -1: it does not travel
  std::vector<std::int32_t> ordinal;              // how many before it go to the same expert
  std::vector<std::int64_t> counts;               // [experts_of] copies for each

  std::int64_t per_token() const { return topk + shared; }
  std::int64_t of_slot(std::int64_t token, std::int64_t k) const { return token * topk + k; }
  std::int64_t of_shared(std::int64_t j, std::int64_t token) const { return tokens * topk + j * shared_step + token; }
};

/// Throws Error: bad_argument (no int32 [BS, K], BS or K out of its range, an id twice in a row or not below
/// `experts`).
void check_ids(const Domain& domain, ConstTensor expert_ids, std::int64_t experts);

/// Slots of experts from moe_expert_num on, up to `special` more, do not travel.
///   x_active_mask : int8; [BS], 1s before 0s; where `slot_masks` also [BS, K], of any pattern; absent: all travel
/// Throws Error: bad_argument (shapes, an id twice in a row or out of its range, a mask of tokens with a 1 after a 0).
Copies copies_of(const Domain& domain, ConstTensor expert_ids, ConstTensor x_active_mask, bool slot_masks = false,
                 std::int64_t special = 0);

}  // namespace expar::ascend
