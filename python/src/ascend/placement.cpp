// include/expar/ascend/placement.h
#include <nanobind/stl/pair.h>

#include "python/src/ascend/ascend.h"

namespace expar::python {

void bind_ascend_placement(nb::module_& m) {
  m.def(
      "_ascend_moe_eplb_update_expert",
      [](const In& expert_ids, const In& eplb_table, std::int64_t local_rank_id, std::int64_t world_size,
         std::int64_t balance_mode) {
        return given(released([&] {
          return ascend::moe_eplb_update_expert(read(expert_ids, "expert_ids"), read(eplb_table, "eplb_table"),
                                                local_rank_id, world_size, balance_mode);
        }));
      },
      "expert_ids"_a, "eplb_table"_a, "local_rank_id"_a, "world_size"_a, "balance_mode"_a,
      "Which instance of its expert each slot goes to.");
  m.def(
      "_ascend_moe_update_expert",
      [](const In& expert_ids, const In& eplb_table, const In& expert_scales, const In& pruning_threshold,
         const In& active_mask, std::int64_t local_rank_id, std::int64_t world_size, std::int64_t balance_mode) {
        ascend::UpdatedExperts updated = released([&] {
          return ascend::moe_update_expert(read(expert_ids, "expert_ids"), read(eplb_table, "eplb_table"),
                                           {.expert_scales = read(expert_scales, "expert_scales"),
                                            .pruning_threshold = read(pruning_threshold, "pruning_threshold"),
                                            .active_mask = read(active_mask, "active_mask"),
                                            .local_rank_id = local_rank_id,
                                            .world_size = world_size,
                                            .balance_mode = balance_mode});
        });
        return std::pair(given(std::move(updated.balanced_expert_ids)), given(std::move(updated.balanced_active_mask)));
      },
      "expert_ids"_a, "eplb_table"_a, nb::kw_only(), "expert_scales"_a.none(), "pruning_threshold"_a.none(),
      "active_mask"_a.none(), "local_rank_id"_a, "world_size"_a, "balance_mode"_a,
      "The same, and which slots are left: balanced_expert_ids, balanced_active_mask.");
}

}  // namespace expar::python
