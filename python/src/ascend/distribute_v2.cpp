// include/expar/ascend/distribute_v2.h
#include <tuple>

#include "python/src/ascend/ascend.h"

namespace expar::python {
namespace {

/// V2Options of arrays, which are kept alive.
struct V2Arrays {
  std::optional<Context> group_tp;
  std::int64_t tp_world_size = 0, tp_rank_id = 0;
  In x_active_mask, elastic_info;
  Out performance_info;
  std::int64_t zero_expert_num = 0, copy_expert_num = 0, const_expert_num = 0;
  std::string refused;

  ascend::V2Options get() const {
    if (!refused.empty()) throw Error(ErrorCode::bad_argument, refused);
    return {.group_tp = group_tp ? &*group_tp : nullptr,
            .tp_world_size = tp_world_size,
            .tp_rank_id = tp_rank_id,
            .x_active_mask = read(x_active_mask, "x_active_mask"),
            .elastic_info = read(elastic_info, "elastic_info"),
            .performance_info = written(performance_info, "performance_info"),
            .zero_expert_num = zero_expert_num,
            .copy_expert_num = copy_expert_num,
            .const_expert_num = const_expert_num};
  }
};

void make_options(V2Arrays* self, const Context* group_tp, std::int64_t tp_world_size, std::int64_t tp_rank_id,
                  const In& x_active_mask, const In& elastic_info, const Out& performance_info,
                  std::int64_t zero_expert_num, std::int64_t copy_expert_num, std::int64_t const_expert_num,
                  const std::string& refused) {
  new (self) V2Arrays{group_tp == nullptr ? std::nullopt : std::optional(*group_tp),
                      tp_world_size,
                      tp_rank_id,
                      x_active_mask,
                      elastic_info,
                      performance_info,
                      zero_expert_num,
                      copy_expert_num,
                      const_expert_num,
                      refused};
}

/// CombineV2 of arrays, which are kept alive.
struct CombineArrays {
  In expand_x, expert_ids, ep_send_counts, tp_send_counts, expert_scales, shared_expert_x, ori_x;
  In const_expert_alpha_1, const_expert_alpha_2, const_expert_v;
  std::int64_t comm_quant_mode = 0;

  ascend::CombineV2 get() const {
    return {.expand_x = read(expand_x, "expand_x"),
            .expert_ids = read(expert_ids, "expert_ids"),
            .ep_send_counts = read(ep_send_counts, "ep_send_counts"),
            .tp_send_counts = read(tp_send_counts, "tp_send_counts"),
            .expert_scales = read(expert_scales, "expert_scales"),
            .shared_expert_x = read(shared_expert_x, "shared_expert_x"),
            .ori_x = read(ori_x, "ori_x"),
            .const_expert_alpha_1 = read(const_expert_alpha_1, "const_expert_alpha_1"),
            .const_expert_alpha_2 = read(const_expert_alpha_2, "const_expert_alpha_2"),
            .const_expert_v = read(const_expert_v, "const_expert_v"),
            .comm_quant_mode = comm_quant_mode};
  }
};

void make_combine(CombineArrays* self, const In& expand_x, const In& expert_ids, const In& ep_send_counts,
                  const In& tp_send_counts, const In& expert_scales, const In& shared_expert_x, const In& ori_x,
                  const In& const_expert_alpha_1, const In& const_expert_alpha_2, const In& const_expert_v,
                  std::int64_t comm_quant_mode) {
  new (self) CombineArrays{expand_x,        expert_ids, ep_send_counts,       tp_send_counts,       expert_scales,
                           shared_expert_x, ori_x,      const_expert_alpha_1, const_expert_alpha_2, const_expert_v,
                           comm_quant_mode};
}

void dispatch(const Context& c, const DomainValue& domain, const V2Arrays& options, const In& x, const In& expert_ids,
              const In& scales, const In& expert_scales, std::int64_t quant_mode,
              const std::optional<std::string>& y_dtype, std::int64_t expert_token_nums_type, const Out& expand_x,
              const Out& dynamic_scales, const Out& assist_info_for_combine, const Out& expert_token_nums,
              const Out& ep_recv_counts, const Out& tp_recv_counts, const Out& expand_scales) {
  const auto handed = [&] {
    return std::tuple(
        options.get(),
        ascend::DispatchV2{.x = read(x, "x"),
                           .expert_ids = read(expert_ids, "expert_ids"),
                           .scales = read(scales, "scales"),
                           .expert_scales = read(expert_scales, "expert_scales"),
                           .quant_mode = quant_mode,
                           .y_dtype = dtype_named(y_dtype),
                           .expert_token_nums_type = expert_token_nums_type},
        ascend::DispatchedV2{.expand_x = written(expand_x, "expand_x"),
                             .dynamic_scales = written(dynamic_scales, "dynamic_scales"),
                             .assist_info_for_combine = written(assist_info_for_combine, "assist_info_for_combine"),
                             .expert_token_nums = written(expert_token_nums, "expert_token_nums"),
                             .ep_recv_counts = written(ep_recv_counts, "ep_recv_counts"),
                             .tp_recv_counts = written(tp_recv_counts, "tp_recv_counts"),
                             .expand_scales = written(expand_scales, "expand_scales")});
  };
  collective(
      c, handed,
      [&](const Context& asked, const ascend::V2Options& told, const ascend::DispatchV2& in,
          const ascend::DispatchedV2& out) { ascend::moe_distribute_dispatch_v2(asked, domain.get(), told, in, out); });
}

void combine(const Context& c, const DomainValue& domain, const V2Arrays& options, const CombineArrays& arrays,
             const Out& out) {
  collective(
      c, [&] { return std::tuple(options.get(), arrays.get(), written(out, "out")); },
      [&](const Context& asked, const ascend::V2Options& told, const ascend::CombineV2& in, Tensor to) {
        ascend::moe_distribute_combine_v2(asked, domain.get(), told, in, to);
      });
}

void combine_add_rms_norm(const Context& c, const DomainValue& domain, const V2Arrays& options,
                          const CombineArrays& arrays, const In& residual_x, const In& gamma, float norm_eps,
                          const Out& y, const Out& rstd, const Out& x) {
  const auto handed = [&] {
    const ascend::CombineAddRmsNorm norm{
        .residual_x = read(residual_x, "residual_x"), .gamma = read(gamma, "gamma"), .norm_eps = norm_eps};
    return std::tuple(options.get(), arrays.get(), norm, written(y, "y"), written(rstd, "rstd"), written(x, "x"));
  };
  collective(c, handed,
             [&](const Context& asked, const ascend::V2Options& told, const ascend::CombineV2& in,
                 const ascend::CombineAddRmsNorm& norm, Tensor to_y, Tensor to_rstd, Tensor to_x) {
               ascend::moe_distribute_combine_add_rms_norm(asked, domain.get(), told, in, norm, to_y, to_rstd, to_x);
             });
}

}  // namespace

void bind_ascend_distribute_v2(nb::module_& m) {
  nb::class_<V2Arrays>(m, "_ascend_V2Options", "What dispatch_v2 and combine_v2 are told alike.")
      .def("__init__", &make_options, nb::kw_only(), "group_tp"_a.none(), "tp_world_size"_a, "tp_rank_id"_a,
           "x_active_mask"_a.none(), "elastic_info"_a.none(), "performance_info"_a.none(), "zero_expert_num"_a,
           "copy_expert_num"_a, "const_expert_num"_a, "refused"_a = "",
           "refused : why this rank cannot take part, which every rank is told.");
  nb::class_<CombineArrays>(m, "_ascend_CombineV2", "What both forms of combine read.")
      .def("__init__", &make_combine, nb::kw_only(), "expand_x"_a.none(), "expert_ids"_a.none(),
           "ep_send_counts"_a.none(), "tp_send_counts"_a.none(), "expert_scales"_a.none(), "shared_expert_x"_a.none(),
           "ori_x"_a.none(), "const_expert_alpha_1"_a.none(), "const_expert_alpha_2"_a.none(),
           "const_expert_v"_a.none(), "comm_quant_mode"_a);
  m.def("_ascend_moe_distribute_dispatch_v2", &dispatch, "context"_a, "domain"_a, "options"_a, nb::kw_only(),
        "x"_a.none(), "expert_ids"_a.none(), "scales"_a.none(), "expert_scales"_a.none(), "quant_mode"_a,
        "y_dtype"_a.none(), "expert_token_nums_type"_a, "expand_x"_a.none(), "dynamic_scales"_a.none(),
        "assist_info_for_combine"_a.none(), "expert_token_nums"_a.none(), "ep_recv_counts"_a.none(),
        "tp_recv_counts"_a.none(), "expand_scales"_a.none(), Waits(),
        "Sends each token to its experts. Collective. Raises the same on every rank.");
  m.def("_ascend_moe_distribute_combine_v2", &combine, "context"_a, "domain"_a, "options"_a, "in_"_a, "out"_a.none(),
        Waits(), "Brings the results home and sums them. Collective. Raises the same on every rank.");
  m.def("_ascend_moe_distribute_combine_add_rms_norm", &combine_add_rms_norm, "context"_a, "domain"_a, "options"_a,
        "in_"_a, nb::kw_only(), "residual_x"_a.none(), "gamma"_a.none(), "norm_eps"_a, "y"_a.none(), "rstd"_a.none(),
        "x"_a.none(), Waits(), "combine_v2, the residual and RMSNorm. Collective. Raises the same on every rank.");
}

}  // namespace expar::python
