// The example of Ascend's npu_moe_eplb_update_expert, on 16 threads instead of 16 NPUs: two ranks hold a shared expert,
// the others an instance of one of 14 experts each; 8 tokens of each rank go to 8 of them as int8, and back.
#include <expar/ascend.h>
#include <expar/expar.h>

#include <cstdint>

#include "ascend_sample.h"

namespace {

namespace ascend = expar::ascend;
using expar::Array;
using expar::DType;

constexpr std::int64_t ep_world_size = 16, moe_expert_num = 14, shared_expert_rank_num = 2;
constexpr std::int64_t bs = 8, h = 7168, k = 8, quant_mode = 2;

/// Row e: the number of instances of expert e, and which they are.
Array make_eplb_table() {
  Array table(DType::int32, {moe_expert_num, 2});
  for (std::int32_t expert = 0; expert < moe_expert_num; ++expert) {
    table.as<std::int32_t>()[2 * expert] = 1;
    table.as<std::int32_t>()[2 * expert + 1] = expert;
  }
  return table;
}

/// Returns what worst_error does.
double run_rank(const expar::Context& group_ep) {
  const ascend::Domain domain{.ep_world_size = ep_world_size,
                              .ep_rank_id = group_ep.rank(),
                              .moe_expert_num = moe_expert_num,
                              .shared_expert_rank_num = shared_expert_rank_num,
                              .global_bs = bs * ep_world_size};
  const Sample in({.bs = bs, .h = h, .k = k, .experts = moe_expert_num, .shared = domain.shared_expert_num},
                  group_ep.rank());

  const Array eplb_table = make_eplb_table();
  const Array balanced_expert_ids =
      ascend::moe_eplb_update_expert(in.expert_ids, eplb_table, domain.ep_rank_id, ep_world_size);

  const std::int64_t a = ascend::expand_rows(domain, domain.ep_rank_id, bs, k);
  const std::int64_t local_expert_num = domain.local_expert_num(domain.ep_rank_id);
  const Array expand_x(DType::int8, {a, h}), dynamic_scales(DType::f32, {a});
  const Array assist_info_for_combine(DType::int32, {a * ascend::kInfoPerRow});
  const Array expert_token_nums(DType::int64, {local_expert_num});
  const Array ep_recv_counts(DType::int32, {local_expert_num * ep_world_size});
  ascend::moe_distribute_dispatch_v2(
      group_ep, domain, {},
      {.x = in.x, .expert_ids = balanced_expert_ids, .scales = in.scales, .quant_mode = quant_mode},
      {.expand_x = expand_x,
       .dynamic_scales = dynamic_scales,
       .assist_info_for_combine = assist_info_for_combine,
       .expert_token_nums = expert_token_nums,
       .ep_recv_counts = ep_recv_counts});

  const Array results = to_bf16(expand_x);  // your experts instead

  const Array out(DType::bf16, {bs, h});
  ascend::moe_distribute_combine_v2(group_ep, domain, {},
                                    {.expand_x = results,
                                     .expert_ids = balanced_expert_ids,
                                     .ep_send_counts = ep_recv_counts,
                                     .expert_scales = in.expert_scales},
                                    out);
  return worst_error(in, out);
}

}  // namespace

int main() { return check_on_threads("ascend_eplb", ep_world_size, run_rank); }
