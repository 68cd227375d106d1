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
  require_axes("expand_x", in.expand_x, 2);
  comm_cmd_info.check(numbers_of({in.expand_x, in.expert_ids, {}, in.comm_quant_mode}));
  comm_cmd_info.check(own_numbers(domain, copies.tokens));
  const bool quantised = in.comm_quant_mode == 2;
  if ((quantised ? in.quant_expand_x : in.expand_x).data() != inbox.expert_rows().base[0])
    refuse(std::string(quantised ? "quant_expand_x" : "expand_x") + " is not that of the setup");
  check_ordinals(copies, in.expand_idx);
  require("expert_scales", in.expert_scales, DType::f32, {copies.tokens, copies.topk});
  require("out", out, in.expand_x.dtype(), {copies.tokens, in.expand_x.size(1)});
  if (!in.shared_expert_x.absent())
    require_range("shared_expert_num beside shared_expert_x", domain.shared_expert_num, 0, 0);
  const ConstTensor shared_expert_x = flat("shared_expert_x", in.shared_expert_x, out);
  check_results(domain, copies, inbox);
  sum_results(group_ep, domain, copies, inbox, in.comm_quant_mode, {in.expert_ids, in.expert_scales, shared_expert_x},
              out);
}

}  // namespace expar::ascend
