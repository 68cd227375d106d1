// include/expar/ascend/gating.h
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "python/src/ascend/ascend.h"

namespace expar::python {

void bind_ascend_gating(nb::module_& m) {
  m.def(
      "_ascend_moe_gating_top_k_softmax",
      [](const Context& c, const In& x, const In& finished, std::int64_t k) {
        ascend::SoftmaxGating out =
            released([&] { return ascend::moe_gating_top_k_softmax(c, read(x, "x"), read(finished, "finished"), k); });
        return std::tuple(given(std::move(out.y)), given(std::move(out.expert_idx)), given(std::move(out.row_idx)));
      },
      "context"_a, "x"_a, "finished"_a.none(), "k"_a, "y, expert_idx, row_idx of the k largest of softmax(x).");
  m.def(
      "_ascend_moe_gating_top_k",
      [](const Context& c, const In& x, std::int64_t k, const In& bias, const In& input_ids, const In& tid2eid,
         std::int64_t k_group, std::int64_t group_count, std::int64_t group_select_mode, std::int64_t renorm,
         std::int64_t norm_type, bool out_flag, float routed_scaling_factor, float eps) {
        ascend::Gating out = released([&] {
          return ascend::moe_gating_top_k(c, read(x, "x"), k,
                                          {.bias = read(bias, "bias"),
                                           .input_ids = read(input_ids, "input_ids"),
                                           .tid2eid = read(tid2eid, "tid2eid"),
                                           .k_group = k_group,
                                           .group_count = group_count,
                                           .group_select_mode = group_select_mode,
                                           .renorm = renorm,
                                           .norm_type = norm_type,
                                           .out_flag = out_flag,
                                           .routed_scaling_factor = routed_scaling_factor,
                                           .eps = eps});
        });
        return std::tuple(given(std::move(out.y)), given(std::move(out.expert_idx)), given(std::move(out.out)));
      },
      "context"_a, "x"_a, "k"_a, nb::kw_only(), "bias"_a.none(), "input_ids"_a.none(), "tid2eid"_a.none(), "k_group"_a,
      "group_count"_a, "group_select_mode"_a, "renorm"_a, "norm_type"_a, "out_flag"_a, "routed_scaling_factor"_a,
      "eps"_a, "y, expert_idx and, with out_flag, the scores.");
}

}  // namespace expar::python
