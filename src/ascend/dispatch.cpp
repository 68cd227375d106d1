// moe_distribute_dispatch_setup and its teardown.
#include <algorithm>
#include <cstring>

#include "src/ascend/copies.h"
#include "src/ascend/mail.h"
#include "src/ascend/quantise.h"
#include "src/ascend/ranges.h"
#include "src/util/check.h"

namespace expar::ascend {
namespace {

/// The scales that a copy is multiplied by: its expert's, or the same of all.
class Smooth {
 public:
  Smooth(const Domain& domain, const DispatchSetup& in, std::int64_t h) {
    const ConstTensor& scales = in.scales;
    if (scales.absent()) {
      if (in.quant_mode == 1) refuse("scales is absent: quant_mode = 1 takes its scales from the caller");
      return;
    }
    if (in.quant_mode == 0) refuse("scales is " + shown(scales) + ", should be absent: quant_mode = 0");
    shared_ = domain.shared_expert_rank_num == 0 ? 0 : domain.shared_expert_num;
    const Shape& shape = scales.shape();
    const bool common = in.quant_mode == 1 && (shape == Shape{1} || shape == Shape{h});
    if (!common) require("scales", scales, DType::f32, {shared_ + domain.moe_expert_num, h});
    values_ = std::span(scales.as<float>(), at(scales.elements()));
    per_expert_ = common ? 0 : h;
  }

  std::span<const float> of_shared(std::int64_t j) const { return row(j); }
  std::span<const float> of_expert(std::int64_t expert) const { return row(shared_ + expert); }

 private:
  std::span<const float> row(std::int64_t i) const {
    return per_expert_ == 0 ? values_ : values_.subspan(at(i * per_expert_), at(per_expert_));
  }

  std::span<const float> values_;
  std::int64_t shared_ = 0, per_expert_ = 0;
};

std::int64_t check_x(ConstTensor x, ConstTensor expert_ids) {
  if ((x.dtype() != DType::f16 && x.dtype() != DType::bf16) || x.shape().rank() != 2)
    refuse("x is " + shown(x) + ", should be f16 or bf16 [BS, H]");
  if (x.size(0) != expert_ids.size(0))
    refuse("x has " + std::to_string(x.size(0)) + " tokens, expert_ids " + std::to_string(expert_ids.size(0)));
  check_range("H", x.size(1), 1024, 8192);
  return x.size(1);
}

Mail write(const Context& group_ep, const Domain& domain, const DispatchSetup& in, Tensor y, Tensor expand_idx) {
  check_domain(group_ep, domain);
  Copies copies = copies_of(domain, in.expert_ids, in.x_active_mask);
  const std::int64_t h = check_x(in.x, in.expert_ids);
  const Quantisation quantisation = checked_quantisation(in.quant_mode, in.x.dtype(), in.y_dtype);
  const std::int64_t row_bytes = message_bytes(quantisation, h);
  const Smooth smooth(domain, in, h);
  require("y", y, quantisation.dtype,
          {copies.tokens * (copies.topk + domain.shared_expert_num),
           row_bytes / static_cast<std::int64_t>(size_of(quantisation.dtype))});
  if (reinterpret_cast<std::uintptr_t>(y.data()) % alignof(float) != 0)
    refuse("y does not begin at a multiple of 4 bytes");
  require("expand_idx", expand_idx, DType::int32, {copies.tokens * copies.topk});

  std::copy_n(copies.ordinal.begin(), copies.tokens * copies.topk, expand_idx.as<std::int32_t>());
  const auto quantise = [&](std::int64_t copy, std::int64_t token, std::span<const float> scales) {
    std::byte* const row = y.bytes() + at(copy * row_bytes);
    quantise_row(quantisation, in.x.rows(token, 1), scales, row, row + scales_at(quantisation, h));
  };
  const auto* const ids = in.expert_ids.as<std::int32_t>();
  group_ep.pool().run(copies.active, [&](std::int64_t token, int) {
    for (std::int64_t k = 0; k < copies.topk; ++k) {
      const std::int64_t slot = copies.of_slot(token, k);
      quantise(slot, token, smooth.of_expert(ids[slot]));
    }
    for (std::int64_t j = 0; j < copies.shared; ++j) quantise(copies.of_shared(j, token), token, smooth.of_shared(j));
  });

  const std::int64_t rows = std::ssize(copies.expert);
  return {
      .rows = y.rows(0, rows),
      .experts = std::move(copies.expert),
      .first_experts = first_experts_of(domain),
      .bound = domain.max_bs(copies.tokens) * copies.per_token(),
      .alike = {in.quant_mode, static_cast<std::int64_t>(quantisation.dtype), domain.shared_expert_num, copies.topk}};
}

/// [LE, W] rows of each source for each local expert, summed up to and with each.
std::vector<std::int32_t> prefix_of(const Plan& plan, std::int64_t sources) {
  std::vector<std::int32_t> prefix;
  std::int32_t sum = 0;
  const ExpertRange local = plan.local();
  for (std::int64_t e = local.first; e < local.first + local.count; ++e) {
    for (std::int64_t s = 0; s < sources; ++s) prefix.push_back(sum += plan.counts()[at(s * plan.experts() + e)]);
  }
  return prefix;
}

}  // namespace

CommCmdInfo moe_distribute_dispatch_setup(const Context& group_ep, const Domain& domain, const DispatchSetup& in,
                                          Tensor y, Tensor expand_idx) {
  return post(group_ep, [&] { return write(group_ep, domain, in, y, expand_idx); });
}

void moe_distribute_dispatch_teardown(const Context& group_ep, const Domain& domain, const DispatchTeardown& in,
                                      CommCmdInfo comm_cmd_info, const Dispatched& out) {
  const Inbox inbox = comm_cmd_info.take();
  const std::vector<const std::byte*> rows = rows_of(inbox);
  const std::int64_t h = check_x(in.x, in.expert_ids), arrived = std::ssize(rows);
  const Quantisation quantisation = checked_quantisation(in.quant_mode, in.x.dtype(), in.y_dtype);
  if (message_bytes(quantisation, h) != inbox.rows().size(1) * 2 || in.y.data() != inbox.gathered().base[0])
    refuse("x, y and quant_mode are not those of the setup");
  const std::int64_t room = check_rows(domain, out.expand_x, in.expert_ids);
  const std::int64_t scales = scales_of_row(quantisation, h);
  require("expand_x", out.expand_x, quantisation.dtype, {room, h});
  if (scales > 0)
    require("dynamic_scales", out.dynamic_scales, scale_dtype(quantisation),
            in.quant_mode == 2 ? Shape{room} : Shape{room, scales});
  require("assist_info_for_combine", out.assist_info_for_combine, DType::int32, {room * kInfoPerRow});
  require("expert_token_nums", out.expert_token_nums, DType::int64, {domain.local_expert_num(domain.ep_rank_id)});
  check_range("expert_token_nums_type", in.expert_token_nums_type, 0, 1);

  group_ep.pool().run(arrived, [&](std::int64_t i, int) {
    const std::byte* const row = rows[at(i)];
    const std::size_t values = at(value_bytes(quantisation, h)), with = at(scale_bytes(quantisation, h));
    std::memcpy(out.expand_x.bytes() + at(i) * values, row, values);
    if (with > 0) std::memcpy(out.dynamic_scales.bytes() + at(i) * with, row + scales_at(quantisation, h), with);
  });
  const std::vector<std::int32_t> prefix = prefix_of(inbox.plan(), domain.ep_world_size);
  std::copy(prefix.begin(), prefix.end(), out.assist_info_for_combine.as<std::int32_t>());
  auto* const nums = out.expert_token_nums.as<std::int64_t>();
  for (std::int64_t e = 0; e < out.expert_token_nums.elements(); ++e) {
    const std::int64_t upto = prefix[at((e + 1) * domain.ep_world_size - 1)];
    nums[e] = in.expert_token_nums_type == 0 || e == 0 ? upto : upto - prefix[at(e * domain.ep_world_size - 1)];
  }
}

}  // namespace expar::ascend
