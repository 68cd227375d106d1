// The example of Ascend's npu_moe_distribute_{dispatch,combine}_{setup,teardown}, on 16 threads instead of 16 NPUs:
// 64 tokens of each rank go to 8 of 16 experts as int8 with a scale each, and back.
#include <expar/ascend.h>
#include <expar/expar.h>

#include <cstdint>
#include <utility>

#include "ascend_sample.h"

namespace {

namespace ascend = expar::ascend;
using expar::Array;
using expar::DType;

constexpr std::int64_t ep_world_size = 16, moe_expert_num = 16, bs = 64, h = 1024, k = 8, quant_mode = 2;

/// Returns what worst_error does.
double run_rank(const expar::Context& group_ep) {
  const ascend::Domain domain{.ep_world_size = ep_world_size,
                              .ep_rank_id = group_ep.rank(),
                              .moe_expert_num = moe_expert_num,
                              .global_bs = bs * ep_world_size};
  const Sample in({.bs = bs, .h = h, .k = k, .experts = moe_expert_num, .shared_rows = 1}, group_ep.rank());

  const Array y(DType::int8, {bs * (k + domain.shared_expert_num), ascend::message_bytes(h, DType::bf16, quant_mode)});
  const Array expand_idx(DType::int32, {bs * k});
  ascend::CommCmdInfo comm_cmd_info = ascend::moe_distribute_dispatch_setup(
      group_ep, domain, {.x = in.x, .expert_ids = in.expert_ids, .scales = in.scales, .quant_mode = quant_mode}, y,
      expand_idx);
  // Work of one's own goes here, while the rows travel.
  const std::int64_t a = ascend::expand_rows(domain, domain.ep_rank_id, bs, k);
  const Array expand_x(DType::int8, {a, h}), dynamic_scales(DType::f32, {a});
  const Array assist_info_for_combine(DType::int32, {a * ascend::kInfoPerRow});
  const Array expert_token_nums(DType::int64, {domain.local_expert_num(domain.ep_rank_id)});
  ascend::moe_distribute_dispatch_teardown(group_ep, domain,
                                           {.x = in.x, .y = y, .expert_ids = in.expert_ids, .quant_mode = quant_mode},
                                           std::move(comm_cmd_info),
                                           {.expand_x = expand_x,
                                            .dynamic_scales = dynamic_scales,
                                            .assist_info_for_combine = assist_info_for_combine,
                                            .expert_token_nums = expert_token_nums});

  const Array results = to_bf16(expand_x);  // your experts instead

  const Array quant_expand_x(DType::int8, {a, ascend::quant_expand_bytes(h)});
  comm_cmd_info = ascend::moe_distribute_combine_setup(
      group_ep, domain,
      {.expand_x = results, .expert_ids = in.expert_ids, .assist_info_for_combine = assist_info_for_combine},
      quant_expand_x);
  // And here.
  const Array out(DType::bf16, {bs, h});
  ascend::moe_distribute_combine_teardown(group_ep, domain,
                                          {.expand_x = results,
                                           .quant_expand_x = quant_expand_x,
                                           .expert_ids = in.expert_ids,
                                           .expand_idx = expand_idx,
                                           .expert_scales = in.expert_scales},
                                          std::move(comm_cmd_info), out);
  return worst_error(in, out);
}

}  // namespace

int main() { return check_on_threads("ascend_distribute", ep_world_size, run_rank); }
