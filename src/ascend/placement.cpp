// Experts to instances: the choice among an expert's instances, and the pruning of slots.
#include <expar/ascend/placement.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "src/ascend/elements.h"

namespace expar::ascend {
namespace {

constexpr std::int64_t kMaxInstances = 1024;

/// The instances of each expert, checked.
class InstanceTable {
 public:
  explicit InstanceTable(const ConstTensor& table) : table_(table.as<std::int32_t>()), width_(table.size(1)) {
    std::vector<std::int64_t> owner(kMaxInstances, -1);
    for (std::int64_t e = 0; e < table.size(0); ++e) {
      require_range("eplb_table", e, 0, count(e), 1, width_ - 1);
      for (std::int64_t i = 0; i < count(e); ++i) {
        const std::int64_t id = instance(e, i);
        require_range("eplb_table", e, 1 + i, id, 0, kMaxInstances - 1);
        std::int64_t& first = owner[at(id)];
        if (first >= 0) {
          refuse("eplb_table[" + std::to_string(e) + "," + std::to_string(1 + i) + "] is " + std::to_string(id) +
                 ", an instance that expert " + std::to_string(first) + " has already");
        }
        first = e;
      }
    }
  }

  std::int64_t count(std::int64_t expert) const { return table_[expert * width_]; }
  std::int64_t instance(std::int64_t expert, std::int64_t i) const { return table_[expert * width_ + 1 + i]; }

 private:
  const std::int32_t* table_;
  std::int64_t width_;
};

/// Which of `count` instances token `token` of a rank takes.
std::int64_t choice(std::int64_t mode, std::int64_t count, std::int64_t token, std::int64_t rank, std::int64_t ranks) {
  if (mode == 1) return token % count;
  if (mode == 2) return rank * count / ranks;
  return rank / ((ranks + count - 1) / count);
}

struct Limits {
  std::int64_t experts, ranks;
};

struct Request {
  ConstTensor expert_ids, eplb_table;
  std::int64_t local_rank_id, world_size, balance_mode;
  bool by_token_needs_ranks;
};

void check(const Request& request, const Limits& limits) {
  const auto& [ids, table, rank, ranks, mode, needs_ranks] = request;
  require_axes("expert_ids", ids, 2);
  require_integers("expert_ids", ids);
  require_axes("eplb_table", table, 2);
  require("eplb_table", table, DType::int32, table.shape());
  require_range("balance_mode", mode, 0, 2);
  const std::int64_t experts = table.size(0);
  require_range("E of eplb_table", experts, 1, limits.experts);
  require_range("BS of expert_ids", ids.size(0), 1, 512);
  require_range("K of expert_ids", ids.size(1), 1, std::min<std::int64_t>(16, experts));
  std::int64_t most_instances = limits.ranks;
  if (mode != 1 || needs_ranks) {
    require_range("world_size", ranks, 2, limits.ranks);
    require_range("local_rank_id", rank, 0, ranks - 1);
    most_instances = ranks;
  }
  require_range("F of eplb_table", table.size(1), 2, most_instances + 1);
}

Array update(const Request& request, const Limits& limits) {
  check(request, limits);
  const auto& [ids, table, rank, ranks, mode, needs_ranks] = request;
  const InstanceTable instances(table);
  Array out(ids.dtype(), ids.shape());
  const std::int64_t topk = ids.size(1);
  for (std::int64_t i = 0; i < ids.elements(); ++i) {
    const std::int64_t expert = integer(ids, i);
    require_range("expert_ids", i / topk, i % topk, expert, 0, table.size(0) - 1);
    const std::int64_t place = choice(mode, instances.count(expert), i / topk, rank, ranks);
    set_integer(out, i, instances.instance(expert, place));
  }
  return out;
}

std::string slot(const char* what, std::int64_t t, std::int64_t k) {
  return std::string(what) + "[" + std::to_string(t) + "," + std::to_string(k) + "]";
}

/// Refuses one input without the others.
bool check_pruning(const UpdateExpertOptions& options, const Shape& ids) {
  const bool has_scales = !options.expert_scales.absent(), has_threshold = !options.pruning_threshold.absent();
  const bool has_mask = !options.active_mask.absent();
  if (has_scales != has_threshold) {
    refuse(has_scales ? "expert_scales is given without pruning_threshold"
                      : "pruning_threshold is given without expert_scales");
  }
  if (!has_scales) {
    if (has_mask) refuse("active_mask is given without expert_scales and pruning_threshold");
    return false;
  }
  require_numbers("expert_scales", options.expert_scales);
  require("expert_scales", options.expert_scales, options.expert_scales.dtype(), ids);
  const Shape row = options.pruning_threshold.shape().rank() == 2 ? Shape{1, ids[1]} : Shape{ids[1]};
  require("pruning_threshold", options.pruning_threshold, DType::f32, row);
  if (has_mask) require("active_mask", options.active_mask, DType::int8, {ids[0]});
  return true;
}

void prune_token(const UpdateExpertOptions& options, std::int64_t t, const Tensor& mask) {
  const std::int64_t topk = mask.size(1);
  const float* const threshold = options.pruning_threshold.as<float>();
  const auto scale = [&](std::int64_t k) { return number(options.expert_scales, t * topk + k); };
  float sum = 0;
  for (std::int64_t k = 0; k < topk; ++k) {
    if (!std::isfinite(scale(k)) || (k > 0 && scale(k) > scale(k - 1))) {
      refuse(slot("expert_scales", t, k) + " is " + std::to_string(scale(k)) +
             (k > 0 ? ", should be a number not above " + std::to_string(scale(k - 1)) + " before it"
                    : ", should be a number"));
    }
    sum += scale(k);
  }
  for (std::int64_t k = 0; k < topk; ++k) {
    mask.as<std::int8_t>()[t * topk + k] = static_cast<std::int8_t>(scale(k) >= threshold[k] * sum);
  }
}

void prune(const UpdateExpertOptions& options, const Tensor& mask) {
  const std::int8_t* const active = options.active_mask.absent() ? nullptr : options.active_mask.as<std::int8_t>();
  for (std::int64_t t = 0; t < mask.size(0); ++t) {
    if (active != nullptr && t > 0 && active[t] != 0 && active[t - 1] == 0) {
      refuse("active_mask[" + std::to_string(t) + "] is true after a false one, should be all true ones first");
    }
    if (active == nullptr || active[t] != 0) prune_token(options, t, mask);
  }
}

}  // namespace

Array moe_eplb_update_expert(ConstTensor expert_ids, ConstTensor eplb_table, std::int64_t local_rank_id,
                             std::int64_t world_size, std::int64_t balance_mode) {
  return update({expert_ids, eplb_table, local_rank_id, world_size, balance_mode, true},
                {.experts = 512, .ranks = 384});
}

UpdatedExperts moe_update_expert(ConstTensor expert_ids, ConstTensor eplb_table, const UpdateExpertOptions& options) {
  UpdatedExperts updated;
  updated.balanced_expert_ids =
      update({expert_ids, eplb_table, options.local_rank_id, options.world_size, options.balance_mode, false},
             {.experts = 1024, .ranks = 768});
  updated.balanced_active_mask = Array(DType::int8, expert_ids.shape());
  const Tensor mask = updated.balanced_active_mask;
  if (check_pruning(options, expert_ids.shape())) {
    prune(options, mask);
  } else {
    std::fill_n(mask.as<std::int8_t>(), mask.elements(), std::int8_t{1});
  }
  return updated;
}

}  // namespace expar::ascend
