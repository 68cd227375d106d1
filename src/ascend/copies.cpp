// The copies of its tokens that a rank sends.
#include "src/ascend/copies.h"

#include <algorithm>
#include <string>

#include "src/ascend/elements.h"

namespace expar::ascend {
namespace {

/// [BS, K] slots that the mask leaves.
std::vector<std::int8_t> counted_of(ConstTensor mask, std::int64_t tokens, std::int64_t topk, bool slot_masks) {
  std::vector<std::int8_t> counted(at(tokens * topk), 1);
  if (mask.absent()) return counted;
  const bool by_slot = slot_masks && mask.shape().rank() == 2;
  require("x_active_mask", mask, DType::int8, by_slot ? Shape{tokens, topk} : Shape{tokens});
  const auto* const ones = mask.as<std::int8_t>();
  for (std::int64_t slot = 0; slot < tokens * topk; ++slot) counted[at(slot)] = ones[by_slot ? slot : slot / topk] != 0;
  for (std::int64_t t = 1; t < tokens && !by_slot; ++t) {
    if (ones[t] != 0 && ones[t - 1] == 0)
      refuse("x_active_mask[" + std::to_string(t) +
             "] is 1 after a 0: tokens that travel come before those that do not");
  }
  return counted;
}

}  // namespace

void check_ids(const Domain& domain, ConstTensor expert_ids, std::int64_t experts) {
  if (expert_ids.dtype() != DType::int32 || expert_ids.shape().rank() != 2)
    refuse("expert_ids is " + shown(expert_ids) + ", should be int32 [BS, K]");
  const std::int64_t topk = expert_ids.size(1);
  require_range("BS", expert_ids.size(0), 1,
                domain.global_bs == 0 ? 512 : std::min<std::int64_t>(512, domain.max_bs(0)));
  require_range("K", topk, 1, std::min<std::int64_t>(16, experts));
  require_experts("expert_ids", expert_ids, experts, 0);
  const auto* ids = expert_ids.as<std::int32_t>();
  for (std::int64_t t = 0; t < expert_ids.size(0); ++t, ids += topk) {
    for (std::int64_t k = 1; k < topk; ++k) {
      if (std::find(ids, ids + k, ids[k]) != ids + k)
        refuse("expert_ids[" + std::to_string(t) + "] has expert " + std::to_string(ids[k]) + " twice");
    }
  }
}

std::int64_t experts_of(const Domain& domain) { return domain.shared_expert_rank_num + domain.moe_expert_num; }

std::vector<std::int64_t> first_experts_of(const Domain& domain) {
  std::vector<std::int64_t> first = {0};
  for (std::int64_t rank = 0; rank < domain.ep_world_size; ++rank)
    first.push_back(first.back() + domain.local_expert_num(rank));
  return first;
}

Copies copies_of(const Domain& domain, ConstTensor expert_ids, ConstTensor x_active_mask, bool slot_masks,
                 std::int64_t special) {
  check_ids(domain, expert_ids, domain.moe_expert_num + special);
  Copies copies;
  copies.tokens = expert_ids.size(0);
  copies.topk = expert_ids.size(1);
  copies.shared = domain.shared_expert_rank_num == 0 ? 0 : domain.shared_expert_num;
  copies.counted = counted_of(x_active_mask, copies.tokens, copies.topk, slot_masks);
  for (auto slot = copies.counted.begin(); slot != copies.counted.end(); slot += copies.topk)
    copies.active.push_back(std::find(slot, slot + copies.topk, 1) != slot + copies.topk);
  copies.shared_step =
      x_active_mask.shape().rank() == 2 ? copies.tokens : std::count(copies.active.begin(), copies.active.end(), 1);
  copies.expert.assign(at(copies.tokens * copies.per_token()), -1);
  copies.ordinal.assign(copies.expert.size(), 0);
  copies.counts.assign(at(experts_of(domain)), 0);
  const auto send = [&](std::int64_t copy, std::int64_t expert) {
    copies.expert[at(copy)] = static_cast<std::int32_t>(expert);
    copies.ordinal[at(copy)] = static_cast<std::int32_t>(copies.counts[at(expert)]++);
  };
  const auto* const ids = expert_ids.as<std::int32_t>();
  for (std::int64_t slot = 0; slot < copies.tokens * copies.topk; ++slot) {
    if (copies.counted[at(slot)] != 0 && ids[slot] < domain.moe_expert_num)
      send(slot, domain.shared_expert_rank_num + ids[slot]);
  }
  for (std::int64_t j = 0; j < copies.shared; ++j) {
    for (std::int64_t t = 0; t < copies.tokens; ++t) {
      if (copies.active[at(t)] != 0) send(copies.of_shared(j, t), domain.shared_rank(j, domain.ep_rank_id));
    }
  }
  return copies;
}

}  // namespace expar::ascend
