// moe_distribute_combine_setup and its teardown.
#include <string>

#include <expar/ascend/distribute.h>

#include "src/ascend/elements.h"
#include "src/ascend/limits.h"
#include "src/ascend/results.h"

namespace expar::ascend {
namespace {

void check_ordinals(const Copies& copies, ConstTensor expand_idx) {
  require("expand_idx", expand_idx, DType::int32, {copies.tokens * copies.topk});
  const auto* const ordinals = expand_idx.as<std::int32_t>();
  for (std::int64_t slot = 0; slot < copies.tokens * copies.topk; ++slot) {
    if (ordinals[slot] == copies.ordinal[at(slot)]) continue;
    refuse("expand_idx[" + std::to_string(slot) + "] is " + std::to_string(ordinals[slot]) + ", of these expert_ids " +
           std::to_string(copies.ordinal[at(slot)]));
  }
}

}  // namespace

CommCmdInfo moe_distribute_combine_setup(const Context& group_ep, const Domain& domain, const CombineSetup& in,
                                         Tensor quant_expand_x) {
  return post(group_ep, [&] {
    check_domain(group_ep, domain, kTwoPhases);
    const char* const name = "assist_info_for_combine";
    if (in.expand_x.shape().rank() == 2)
      require(name, in.assist_info_for_combine, DType::int32, {in.expand_x.size(0) * kInfoPerRow});
    return write_results(group_ep, domain, {in.expand_x, in.expert_ids, in.assist_info_for_combine, in.comm_quant_mode},
                         name, quant_expand_x);
  });
}

void moe_distribute_combine_teardown(const Context& group_ep, const Domain& domain, const CombineTeardown& in,
                                     CommCmdInfo comm_cmd_info, Tensor out) {
  const Inbox inbox = comm_cmd_info.take();
  const Copies copies = copies_of(domain, in.expert_ids, in.x_active_mask);
  const ConstTensor& posted = in.comm_quant_mode == 2 ? in.quant_expand_x : in.expand_x;
  if (posted.data() != inbox.expert_rows().base[0] ||
      posted.size(1) * static_cast<std::int64_t>(size_of(posted.dtype())) != inbox.rows().size(1) * 2)
    refuse("expand_x, quant_expand_x and comm_quant_mode are not those of the setup");
  check_ordinals(copies, in.expand_idx);
  require("expert_scales", in.expert_scales, DType::f32, {copies.tokens, copies.topk});
  require("out", out, in.expand_x.dtype(), {copies.tokens, in.expand_x.size(1)});
  if (!in.shared_expert_x.absent()) {
    require_range("shared_expert_num beside shared_expert_x", domain.shared_expert_num, 0, 0);
    require("shared_expert_x", in.shared_expert_x, out.dtype(), out.shape());
  }
  check_results(domain, copies, inbox);
  sum_results(group_ep, domain, copies, inbox, in.comm_quant_mode,
              {in.expert_ids, in.expert_scales, in.shared_expert_x}, out);
}

}  // namespace expar::ascend
