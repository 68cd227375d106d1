// moe_distribute_dispatch_setup and its teardown.
#include <algorithm>

#include <expar/ascend/distribute.h>

#include "src/ascend/elements.h"
#include "src/ascend/limits.h"
#include "src/ascend/message.h"

namespace expar::ascend {

CommCmdInfo moe_distribute_dispatch_setup(const Context& group_ep, const Domain& domain, const DispatchSetup& in,
                                          Tensor y, Tensor expand_idx) {
  return post(group_ep, [&] {
    check_domain(group_ep, domain, kTwoPhases);
    const Copies copies = copies_of(domain, in.expert_ids, in.x_active_mask);
    const Sent sent{in.x, in.expert_ids, in.scales, in.quant_mode, in.y_dtype};
    const Message message = message_of(sent, false);
    const DType dtype = message.quantisation.dtype;
    require("y", y, dtype,
            {copies.tokens * (copies.topk + domain.shared_expert_num),
             message.bytes() / static_cast<std::int64_t>(size_of(dtype))});
    require("expand_idx", expand_idx, DType::int32, {copies.tokens * copies.topk});
    std::copy_n(copies.ordinal.begin(), copies.tokens * copies.topk, expand_idx.as<std::int32_t>());
    return write_messages(group_ep, domain, copies, sent, message, y);
  });
}

void moe_distribute_dispatch_teardown(const Context& group_ep, const Domain& domain, const DispatchTeardown& in,
                                      CommCmdInfo comm_cmd_info, const Dispatched& out) {
  const Inbox inbox = comm_cmd_info.take();
  const Sent sent{in.x, in.expert_ids, {}, in.quant_mode, in.y_dtype};
  require_axes("expert_ids", in.expert_ids, 2);
  const Message message = message_of(sent, false);
  comm_cmd_info.check(numbers_of(sent, message));
  comm_cmd_info.check(own_numbers(domain, in.expert_ids.size(0)));
  if (in.y.data() != inbox.expert_rows().base[0]) refuse("y is not that of the setup");
  const std::int64_t rows = check_rows(domain, out.expand_x, in.expert_ids);
  require("assist_info_for_combine", out.assist_info_for_combine, DType::int32, {rows * kInfoPerRow});
  const Unpacked unpacked{out.expand_x, out.dynamic_scales, out.expert_token_nums, in.expert_token_nums_type};
  check_unpacked(domain, message, unpacked);
  const std::vector<std::int32_t> prefix = unpack(group_ep, domain, inbox, message, unpacked);
  std::copy(prefix.begin(), prefix.end(), out.assist_info_for_combine.as<std::int32_t>());
}

}  // namespace expar::ascend
