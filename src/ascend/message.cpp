// Rows of a dispatch as they travel.
#include "src/ascend/message.h"

#include <algorithm>
#include <cstring>

#include "src/ascend/elements.h"

namespace expar::ascend {
namespace {

std::int64_t align(std::int64_t bytes, std::int64_t to) { return (bytes + to - 1) / to * to; }

/// The scales that a copy is multiplied by: its expert's, or the same of all.
class Smooth {
 public:
  Smooth(const Domain& domain, const Sent& sent, std::int64_t h) {
    const ConstTensor& scales = sent.scales;
    if (scales.absent()) {
      if (sent.quant_mode == 1) refuse("scales is absent: quant_mode = 1 takes its scales from the caller");
      return;
    }
    if (sent.quant_mode == 0) refuse("scales is " + shown(scales) + ", should be absent: quant_mode = 0");
    const Shape& shape = scales.shape();
    const bool common = sent.quant_mode == 1 && (shape == Shape{1} || shape == Shape{h});
    // Without ranks of shared experts their rows may be left out.
    const bool without_shared = domain.shared_expert_rank_num == 0 && shape == Shape{domain.moe_expert_num, h};
    shared_ = without_shared ? 0 : domain.shared_expert_num;
    require("scales", scales, DType::f32, common ? shape : Shape{shared_ + domain.moe_expert_num, h});
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

/// What a token's last copy became; the next one is the same where its scales are.
struct Row {
  const std::byte* bytes = nullptr;
  const float* scales = nullptr;
};

}  // namespace

std::int64_t Message::sender_at() const { return align(scales_at(quantisation, h) + scale_bytes(quantisation, h), 32); }

std::int64_t Message::bytes() const {
  return with_sender ? align(sender_at() + static_cast<std::int64_t>(sizeof(Sender)), 512)
                     : message_bytes(quantisation, h);
}

Message message_of(const Sent& sent, bool with_sender) {
  const ConstTensor& x = sent.x;
  if ((x.dtype() != DType::f16 && x.dtype() != DType::bf16) || x.shape().rank() != 2)
    refuse("x is " + shown(x) + ", should be f16 or bf16 [BS, H]");
  if (x.size(0) != sent.expert_ids.size(0))
    refuse("x has " + std::to_string(x.size(0)) + " tokens, expert_ids " + std::to_string(sent.expert_ids.size(0)));
  require_range("H", x.size(1), 1024, 8192);
  return {checked_quantisation(sent.quant_mode, x.dtype(), sent.y_dtype), x.size(1), with_sender};
}

Mail write_messages(const Context& group_ep, const Domain& domain, const Copies& copies, const Sent& sent,
                    const Message& message, Tensor y) {
  const std::int64_t bytes = message.bytes();
  const Smooth smooth(domain, sent, message.h);
  const std::size_t values_and_scales =
      at(scales_at(message.quantisation, message.h) + scale_bytes(message.quantisation, message.h));
  const auto write = [&](std::int64_t copy, std::int64_t token, std::int64_t k, std::span<const float> scales,
                         Row& last) {
    if (copies.expert[at(copy)] < 0) return;
    std::byte* const row = y.bytes() + at(copy * bytes);
    if (last.bytes != nullptr && last.scales == scales.data()) {
      std::memcpy(row, last.bytes, values_and_scales);
    } else {
      quantise_row(message.quantisation, sent.x.rows(token, 1), scales, row,
                   row + scales_at(message.quantisation, message.h));
    }
    last = {row, scales.data()};
    if (!message.with_sender) return;
    const bool weighted = k < copies.topk && !sent.weights.absent();
    const Sender sender = {static_cast<std::int32_t>(token), static_cast<std::int32_t>(k),
                           weighted ? sent.weights.as<float>()[copies.of_slot(token, k)] : 1.0F};
    std::memcpy(row + message.sender_at(), &sender, sizeof sender);
  };
  const auto* const ids = sent.expert_ids.as<std::int32_t>();
  group_ep.pool().run(copies.tokens, [&](std::int64_t token, int) {
    if (copies.active[at(token)] == 0) return;
    Row last;
    for (std::int64_t k = 0; k < copies.topk; ++k) {
      const std::int64_t slot = copies.of_slot(token, k);
      if (copies.expert[at(slot)] >= 0) write(slot, token, k, smooth.of_expert(ids[slot]), last);
    }
    for (std::int64_t j = 0; j < copies.shared; ++j)
      write(copies.of_shared(j, token), token, copies.topk + j, smooth.of_shared(j), last);
  });
  return {.rows = y.rows(0, std::ssize(copies.expert)),
          .experts = copies.expert,
          .first_experts = first_experts_of(domain),
          .bound = domain.max_bs(copies.tokens) * copies.per_token(),
          .alike = numbers_of(sent, message),
          .own = own_numbers(domain, copies.tokens)};
}

std::vector<NamedNumber> numbers_of(const Sent& sent, const Message& message) {
  return {{"H", message.h},
          {"x", static_cast<std::int64_t>(sent.x.dtype())},
          {"quant_mode", sent.quant_mode},
          {"y_dtype", static_cast<std::int64_t>(message.quantisation.dtype)},
          {"K", sent.expert_ids.size(1)}};
}

void check_unpacked(const Domain& domain, const Message& message, const Unpacked& out) {
  const Quantisation& quantisation = message.quantisation;
  const std::int64_t room = out.expand_x.size(0), with = scales_of_row(quantisation, message.h);
  require("expand_x", out.expand_x, quantisation.dtype, {room, message.h});
  if (with > 0)
    require("dynamic_scales", out.dynamic_scales, scale_dtype(quantisation),
            with == 1 ? Shape{room} : Shape{room, with});
  require("expert_token_nums", out.expert_token_nums, DType::int64, {domain.local_expert_num(domain.ep_rank_id)});
  require_range("expert_token_nums_type", out.expert_token_nums_type, 0, 1);
}

std::vector<std::int32_t> unpack(const Context& group_ep, const Domain& domain, const Inbox& inbox,
                                 const Message& message, const Unpacked& out) {
  const Quantisation& quantisation = message.quantisation;
  const std::vector<const std::byte*> rows = rows_of(inbox);
  if (std::ssize(rows) > out.expand_x.size(0))
    refuse(std::to_string(rows.size()) + " rows came, expand_x has room for " + std::to_string(out.expand_x.size(0)));
  group_ep.pool().run(std::ssize(rows), [&](std::int64_t i, int) {
    const std::byte* const row = rows[at(i)];
    const std::size_t values = at(value_bytes(quantisation, message.h)),
                      scales = at(scale_bytes(quantisation, message.h));
    std::memcpy(out.expand_x.bytes() + at(i) * values, row, values);
    if (scales > 0)
      std::memcpy(out.dynamic_scales.bytes() + at(i) * scales, row + scales_at(quantisation, message.h), scales);
    if (!message.with_sender) return;
    Sender sender;
    std::memcpy(&sender, row + message.sender_at(), sizeof sender);
    if (!out.senders.absent()) {
      out.senders.as<std::int32_t>()[3 * i + 1] = sender.token;
      out.senders.as<std::int32_t>()[3 * i + 2] = sender.slot;
    }
    if (!out.weights.absent()) out.weights.as<float>()[i] = sender.weight;
  });

  const Plan& plan = inbox.plan();
  const ExpertRange local = plan.local();
  std::vector<std::int32_t> prefix;
  std::int32_t sum = 0;
  for (std::int64_t e = 0; e < local.count; ++e) {
    const std::int32_t before = sum;
    for (std::int64_t s = 0; s < domain.ep_world_size; ++s) {
      const std::int32_t from = sum;
      prefix.push_back(sum += plan.counts()[at(s * plan.experts() + local.first + e)]);
      for (std::int32_t i = from; i < sum && !out.senders.absent(); ++i)
        out.senders.as<std::int32_t>()[3 * i] = static_cast<std::int32_t>(s);
    }
    out.expert_token_nums.as<std::int64_t>()[e] = out.expert_token_nums_type == 0 ? sum : sum - before;
  }
  return prefix;
}

}  // namespace expar::ascend
