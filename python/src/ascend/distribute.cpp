// include/expar/ascend/distribute.h
#include <tuple>

#include "python/src/ascend/ascend.h"

namespace expar::python {
namespace {

using ascend::CommCmdInfo;

CommCmdInfo dispatch_setup(const Context& c, const DomainValue& domain, const In& x, const In& expert_ids,
                           const In& scales, const In& x_active_mask, std::int64_t quant_mode,
                           const std::optional<std::string>& y_dtype, const Out& y, const Out& expand_idx) {
  const auto handed = [&] {
    return std::tuple(ascend::DispatchSetup{.x = read(x, "x"),
                                            .expert_ids = read(expert_ids, "expert_ids"),
                                            .scales = read(scales, "scales"),
                                            .x_active_mask = read(x_active_mask, "x_active_mask"),
                                            .quant_mode = quant_mode,
                                            .y_dtype = dtype_named(y_dtype)},
                      written(y, "y"), written(expand_idx, "expand_idx"));
  };
  return collective(c, handed,
                    [&](const Context& asked, const ascend::DispatchSetup& in, Tensor rows, Tensor ordinals) {
                      return ascend::moe_distribute_dispatch_setup(asked, domain.get(), in, rows, ordinals);
                    });
}

/// What `read` does; if it throws, all rows are let in first, as the teardown would.
template <class Read>
void or_take(CommCmdInfo& info, Read&& read) {
  try {
    read();
  } catch (...) {
    info.take();
    throw;
  }
}

void dispatch_teardown(const Context& c, const DomainValue& domain, const In& x, const In& y, const In& expert_ids,
                       CommCmdInfo& info, std::int64_t quant_mode, const std::optional<std::string>& y_dtype,
                       std::int64_t expert_token_nums_type, const Out& expand_x, const Out& dynamic_scales,
                       const Out& assist_info_for_combine, const Out& expert_token_nums) {
  ascend::DispatchTeardown in;
  ascend::Dispatched out;
  or_take(info, [&] {
    in = {.x = read(x, "x"),
          .y = read(y, "y"),
          .expert_ids = read(expert_ids, "expert_ids"),
          .quant_mode = quant_mode,
          .y_dtype = dtype_named(y_dtype),
          .expert_token_nums_type = expert_token_nums_type};
    out = {.expand_x = written(expand_x, "expand_x"),
           .dynamic_scales = written(dynamic_scales, "dynamic_scales"),
           .assist_info_for_combine = written(assist_info_for_combine, "assist_info_for_combine"),
           .expert_token_nums = written(expert_token_nums, "expert_token_nums")};
  });
  ascend::moe_distribute_dispatch_teardown(c, domain.get(), in, std::move(info), out);
}

CommCmdInfo combine_setup(const Context& c, const DomainValue& domain, const In& expand_x, const In& expert_ids,
                          const In& assist_info_for_combine, std::int64_t comm_quant_mode, const Out& quant_expand_x) {
  const auto handed = [&] {
    return std::tuple(
        ascend::CombineSetup{.expand_x = read(expand_x, "expand_x"),
                             .expert_ids = read(expert_ids, "expert_ids"),
                             .assist_info_for_combine = read(assist_info_for_combine, "assist_info_for_combine"),
                             .comm_quant_mode = comm_quant_mode},
        written(quant_expand_x, "quant_expand_x"));
  };
  return collective(c, handed, [&](const Context& asked, const ascend::CombineSetup& in, Tensor quantised) {
    return ascend::moe_distribute_combine_setup(asked, domain.get(), in, quantised);
  });
}

void combine_teardown(const Context& c, const DomainValue& domain, const In& expand_x, const In& quant_expand_x,
                      const In& expert_ids, const In& expand_idx, const In& expert_scales, CommCmdInfo& info,
                      const In& x_active_mask, const In& shared_expert_x, std::int64_t comm_quant_mode,
                      const Out& out) {
  ascend::CombineTeardown in;
  Tensor to;
  or_take(info, [&] {
    in = {.expand_x = read(expand_x, "expand_x"),
          .quant_expand_x = read(quant_expand_x, "quant_expand_x"),
          .expert_ids = read(expert_ids, "expert_ids"),
          .expand_idx = read(expand_idx, "expand_idx"),
          .expert_scales = read(expert_scales, "expert_scales"),
          .x_active_mask = read(x_active_mask, "x_active_mask"),
          .shared_expert_x = read(shared_expert_x, "shared_expert_x"),
          .comm_quant_mode = comm_quant_mode};
    to = written(out, "out");
  });
  ascend::moe_distribute_combine_teardown(c, domain.get(), in, std::move(info), to);
}

}  // namespace

void bind_ascend_distribute(nb::module_& m) {
  nb::class_<CommCmdInfo>(m, "_ascend_CommCmdInfo", R"(
What a setup has posted, for its teardown. What was written must stay until then. One that is dropped before ends the
job.)");
  m.def("_ascend_moe_distribute_dispatch_setup", &dispatch_setup, "context"_a, "domain"_a, nb::kw_only(), "x"_a.none(),
        "expert_ids"_a.none(), "scales"_a.none(), "x_active_mask"_a.none(), "quant_mode"_a, "y_dtype"_a.none(),
        "y"_a.none(), "expand_idx"_a.none(), Waits(),
        "Quantises the rows of x into y and posts them. What is wrong is an error of the teardown, on every rank.");
  m.def("_ascend_moe_distribute_dispatch_teardown", &dispatch_teardown, "context"_a, "domain"_a, nb::kw_only(),
        "x"_a.none(), "y"_a.none(), "expert_ids"_a.none(), "comm_cmd_info"_a, "quant_mode"_a, "y_dtype"_a.none(),
        "expert_token_nums_type"_a, "expand_x"_a.none(), "dynamic_scales"_a.none(), "assist_info_for_combine"_a.none(),
        "expert_token_nums"_a.none(), Waits(), "Waits until the rows of all ranks are there and unpacks them.");
  m.def("_ascend_moe_distribute_combine_setup", &combine_setup, "context"_a, "domain"_a, nb::kw_only(),
        "expand_x"_a.none(), "expert_ids"_a.none(), "assist_info_for_combine"_a.none(), "comm_quant_mode"_a,
        "quant_expand_x"_a.none(), Waits(), "Posts each result to where its row came from.");
  m.def("_ascend_moe_distribute_combine_teardown", &combine_teardown, "context"_a, "domain"_a, nb::kw_only(),
        "expand_x"_a.none(), "quant_expand_x"_a.none(), "expert_ids"_a.none(), "expand_idx"_a.none(),
        "expert_scales"_a.none(), "comm_cmd_info"_a, "x_active_mask"_a.none(), "shared_expert_x"_a.none(),
        "comm_quant_mode"_a, "out"_a.none(), Waits(), "Waits for the results of all ranks and sums them.");
}

}  // namespace expar::python
