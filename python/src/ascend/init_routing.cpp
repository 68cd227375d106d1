// include/expar/ascend/init_routing.h
#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>

#include <array>
#include <tuple>

#include "python/src/ascend/ascend.h"

namespace expar::python {

void bind_ascend_init_routing(nb::module_& m) {
  m.def(
      "_ascend_moe_init_routing",
      [](const In& x, const In& row_idx, const In& expert_idx, std::int64_t active_num) {
        ascend::InitRouting out = released([&] {
          return ascend::moe_init_routing(read(x, "x"), read(row_idx, "row_idx"), read(expert_idx, "expert_idx"),
                                          active_num);
        });
        return std::tuple(given(std::move(out.expanded_x)), given(std::move(out.expanded_row_idx)),
                          given(std::move(out.expanded_expert_idx)));
      },
      "x"_a, "row_idx"_a, "expert_idx"_a, "active_num"_a, "expanded_x, expanded_row_idx, expanded_expert_idx.");
  m.def(
      "_ascend_moe_init_routing_v2",
      [](const Context& c, const In& x, const In& expert_idx, const In& scale, const In& offset,
         std::int64_t active_num, std::int64_t expert_capacity, std::int64_t expert_num, std::int64_t drop_pad_mode,
         std::int64_t expert_tokens_num_type, bool expert_tokens_num_flag, std::int64_t quant_mode,
         const std::optional<std::array<std::int64_t, 2>>& active_expert_range, std::int64_t row_idx_type) {
        ascend::InitRoutingV2 out = released([&] {
          return ascend::moe_init_routing_v2(c, read(x, "x"), read(expert_idx, "expert_idx"),
                                             {.scale = read(scale, "scale"),
                                              .offset = read(offset, "offset"),
                                              .active_num = active_num,
                                              .expert_capacity = expert_capacity,
                                              .expert_num = expert_num,
                                              .drop_pad_mode = drop_pad_mode,
                                              .expert_tokens_num_type = expert_tokens_num_type,
                                              .expert_tokens_num_flag = expert_tokens_num_flag,
                                              .quant_mode = quant_mode,
                                              .active_expert_range = active_expert_range,
                                              .row_idx_type = row_idx_type});
        });
        return std::tuple(given(std::move(out.expanded_x)), given(std::move(out.expanded_row_idx)),
                          given(std::move(out.expert_token_cumsum_or_count)), given(std::move(out.expanded_scale)));
      },
      "context"_a, "x"_a, "expert_idx"_a, nb::kw_only(), "scale"_a.none(), "offset"_a.none(), "active_num"_a,
      "expert_capacity"_a, "expert_num"_a, "drop_pad_mode"_a, "expert_tokens_num_type"_a, "expert_tokens_num_flag"_a,
      "quant_mode"_a, "active_expert_range"_a.none(), "row_idx_type"_a,
      "expanded_x, expanded_row_idx, expert_token_cumsum_or_count, expanded_scale.");
}

}  // namespace expar::python
