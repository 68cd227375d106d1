// include/expar/ascend/domain.h
#include "python/src/ascend/ascend.h"

namespace expar::python {
namespace {

using ascend::Domain;

void make_domain(DomainValue* self, std::int64_t ep_world_size, std::int64_t ep_rank_id, std::int64_t moe_expert_num,
                 std::int64_t expert_shard_type, std::int64_t shared_expert_num, std::int64_t shared_expert_rank_num,
                 std::int64_t global_bs, std::int64_t comm_type, const std::string& comm_alg) {
  new (self) DomainValue{{.ep_world_size = ep_world_size,
                          .ep_rank_id = ep_rank_id,
                          .moe_expert_num = moe_expert_num,
                          .expert_shard_type = expert_shard_type,
                          .shared_expert_num = shared_expert_num,
                          .shared_expert_rank_num = shared_expert_rank_num,
                          .global_bs = global_bs,
                          .comm_type = comm_type},
                         comm_alg};
}

/// What has sizes. Throws Error: bad_argument (numbers that no domain has and sizes cannot be made of).
Domain sized(const DomainValue& value) {
  const Domain d = value.get();
  if (d.ep_world_size > 0 && d.shared_expert_rank_num >= 0 && d.shared_expert_rank_num < d.ep_world_size &&
      (d.shared_expert_rank_num == 0 || (d.shared_expert_num > 0 && d.shared_expert_num <= d.shared_expert_rank_num)) &&
      d.ep_rank_id >= 0 && d.ep_rank_id < d.ep_world_size)
    return d;
  throw Error(ErrorCode::bad_argument, "rank " + std::to_string(d.ep_rank_id) + " of ep_world_size " +
                                           std::to_string(d.ep_world_size) + " with " +
                                           std::to_string(d.shared_expert_num) + " shared experts on " +
                                           std::to_string(d.shared_expert_rank_num) + " ranks is no rank of a domain");
}

}  // namespace

void bind_ascend_domain(nb::module_& m) {
  nb::class_<DomainValue>(m, "_ascend_Domain", R"(
Who holds which expert: the same on all ranks, but for ep_rank_id. Names and ranges are those of the torch_npu pages.)")
      .def("__init__", &make_domain, nb::kw_only(), "ep_world_size"_a, "ep_rank_id"_a, "moe_expert_num"_a,
           "expert_shard_type"_a = 0, "shared_expert_num"_a = 1, "shared_expert_rank_num"_a = 0, "global_bs"_a = 0,
           "comm_type"_a = 0, "comm_alg"_a = "")
      .def(
          "check", [](const DomainValue& d) { d.get().check(); },
          "Raises BadArgument, naming the first value out of its range, and the range.")
      .def_prop_ro(
          "experts_per_rank", [](const DomainValue& d) { return sized(d).experts_per_rank(); },
          "LE, of a rank that holds experts of the MoE")
      .def_prop_ro(
          "local_expert_num", [](const DomainValue& d) { return sized(d).local_expert_num(d.domain.ep_rank_id); },
          "LE of this rank")
      .def_prop_ro("ep_world_size", [](const DomainValue& d) { return d.domain.ep_world_size; })
      .def_prop_ro("ep_rank_id", [](const DomainValue& d) { return d.domain.ep_rank_id; });
  m.def(
      "_ascend_expand_rows",
      [](const DomainValue& d, std::int64_t rank, std::int64_t bs, std::int64_t k) {
        return ascend::expand_rows(sized(d), rank, bs, k);
      },
      "domain"_a, "rank"_a, "bs"_a, "k"_a, "A, the rows of expand_x on a rank.");
  m.def(
      "_ascend_message_bytes",
      [](std::int64_t h, const std::string& x, std::int64_t quant_mode, const std::optional<std::string>& y_dtype) {
        return ascend::message_bytes(h, parse_dtype(x), quant_mode, dtype_named(y_dtype));
      },
      "h"_a, "x"_a, "quant_mode"_a, "y_dtype"_a = nb::none(),
      "Bytes of a dispatched row of values of dtype ``x``. Raises BadArgument (no such mode, or not of this y_dtype).");
  m.def("_ascend_token_msg_size", &ascend::token_msg_size, "h"_a, "quant_mode"_a,
        "Elements of a row of y as the page gives them.");
  m.def("_ascend_quant_expand_bytes", &ascend::quant_expand_bytes, "h"_a, "Bytes of a row of quant_expand_x.");
  m.def(
      "_ascend_hccl_buffer_bytes",
      [](const DomainValue& d, std::int64_t bs, std::int64_t h, std::int64_t k) {
        return ascend::hccl_buffer_bytes(sized(d), bs, h, k);
      },
      "domain"_a, "bs"_a, "h"_a, "k"_a, "What the pages ask HCCL_BUFFSIZE to be, in bytes.");
  m.def(
      "_ascend_hccl_buffsize",
      [](const DomainValue& d, std::int64_t bs, std::int64_t h, std::int64_t k) {
        return ascend::hccl_buffsize(sized(d), bs, h, k);
      },
      "domain"_a, "bs"_a, "h"_a, "k"_a, "The least HCCL_BUFFSIZE, in megabytes.");
  m.def(
      "_ascend_check_hccl_buffer",
      [](const DomainValue& d, std::int64_t bs, std::int64_t h, std::int64_t k, std::int64_t megabytes) {
        ascend::check_hccl_buffer(d.get(), bs, h, k, megabytes);
      },
      "domain"_a, "bs"_a, "h"_a, "k"_a, "megabytes"_a,
      "Raises BadArgument (a buffer of so many megabytes is too small, with what is needed).");
}

}  // namespace expar::python
