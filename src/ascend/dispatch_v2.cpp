// moe_distribute_dispatch_v2.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include <expar/collectives.h>

#include "src/ascend/elements.h"
#include "src/ascend/limits.h"
#include "src/ascend/message.h"
#include "src/ascend/v2.h"

namespace expar::ascend {
namespace {

/// A: rows of one tp rank in expand_x.
std::int64_t rows_of(const Domain& domain, const V2Options& options, const DispatchV2& in, Tensor expand_x) {
  if (expand_x.shape().rank() != 2) refuse("expand_x is " + shown(expand_x) + ", should be [A, H], with TP [tp A, H]");
  const std::int64_t rows = expand_x.size(0) / tp_ranks(options);
  check_rows(domain, expand_x.rows(0, rows), in.expert_ids);
  return rows;
}

}  // namespace

void moe_distribute_dispatch_v2(const Context& group_ep, const Domain& domain, const V2Options& options,
                                const DispatchV2& in, const DispatchedV2& out) {
  const std::int64_t tp = tp_ranks(options);
  Array own, own_scales, own_counts;  // with TP: what came to this rank
  std::int64_t arrived = 0;
  std::vector<std::int64_t> alike;  // what tp ranks must agree on
  const auto work = [&] {
    Left left;
    Array y;
    Message message;
    Unpacked unpacked;
    const Inbox inbox = exchange(group_ep, options, [&] {
      left = ranks_left(group_ep, domain, options);
      const Domain& d = left.domain;
      const Copies copies = copies_of(d, options, in.expert_ids);
      const Sent sent{in.x, in.expert_ids, in.scales, in.quant_mode, in.y_dtype, in.expert_scales};
      if (!in.expert_scales.absent())
        require("expert_scales", in.expert_scales, DType::f32, {copies.tokens, copies.topk});
      message = message_of(sent, true);
      const std::int64_t rows = rows_of(d, options, in, out.expand_x);
      require("assist_info_for_combine", out.assist_info_for_combine, DType::int32, {rows * kInfoPerRow});
      require("ep_recv_counts", out.ep_recv_counts, DType::int32,
              {d.local_expert_num(d.ep_rank_id) * d.ep_world_size * tp});
      if (tp > 1 || !out.tp_recv_counts.absent()) require("tp_recv_counts", out.tp_recv_counts, DType::int32, {tp});
      if (!in.expert_scales.absent()) require("expand_scales", out.expand_scales, DType::f32, {rows});
      unpacked = {out.expand_x,
                  out.dynamic_scales,
                  out.expert_token_nums,
                  in.expert_token_nums_type,
                  out.assist_info_for_combine,
                  in.expert_scales.absent() ? Tensor() : out.expand_scales};
      check_unpacked(d, message, unpacked);
      if (tp > 1) {
        own = Array(out.expand_x.dtype(), {rows, message.h});
        unpacked.expand_x = own;
        if (scales_of_row(message.quantisation, message.h) > 0) {
          own_scales = Array(out.dynamic_scales.dtype(), out.dynamic_scales.rows(0, rows).shape());
          unpacked.dynamic_scales = own_scales;
        }
      }
      alike = {message.h, in.quant_mode, static_cast<std::int64_t>(message.quantisation.dtype), d.ep_world_size,
               out.expand_x.size(0)};
      y = Array(DType::int8, {std::ssize(copies.expert), message.bytes()});
      return write_messages(group_ep, d, copies, sent, message, y);
    });
    const std::vector<std::int32_t> counts = unpack(group_ep, left.domain, inbox, message, unpacked);
    arrived = counts.back();
    if (tp > 1) {
      own_counts = Array(DType::int32, {std::ssize(counts)});
      std::copy(counts.begin(), counts.end(), own_counts.as<std::int32_t>());
    } else {
      std::copy(counts.begin(), counts.end(), out.ep_recv_counts.as<std::int32_t>());
      if (!out.tp_recv_counts.absent()) *out.tp_recv_counts.as<std::int32_t>() = counts.back();
    }
    auto* const ranks = out.assist_info_for_combine.as<std::int32_t>();
    for (std::int64_t i = 0; i < arrived && !left.rank_of.empty(); ++i) ranks[3 * i] = left.rank_of[at(ranks[3 * i])];
  };
  with_tp(options, work, [&] {
    const Context& group_tp = *options.group_tp;
    alike.push_back(arrived);
    const std::int64_t each = std::ssize(alike);
    const Array both(DType::int64, {2 * each});
    all_gather(group_tp, ConstTensor(alike.data(), Shape{each}), both);
    const auto* const first = both.as<std::int64_t>();
    for (const auto& [i, what] : {std::pair{0, "H"}, {1, "quant_mode"}, {2, "y_dtype"}, {3, "ep_world_size"}}) {
      if (first[i] != first[each + i])
        refuse(std::string("the tp ranks differ in ") + what + ": " + std::to_string(first[i]) + " and " +
               std::to_string(first[each + i]));
    }
    const std::int64_t all = first[each - 1] + first[2 * each - 1];
    require_range("rows of both tp ranks in expand_x", all, 0, std::min(first[4], first[each + 4]));
    for (int part = 0; part < 2; ++part)
      out.tp_recv_counts.as<std::int32_t>()[part] = static_cast<std::int32_t>(first[(part + 1) * each - 1]);
    all_gather(group_tp, own_counts, out.ep_recv_counts);
    all_gather(group_tp, own.view().rows(0, arrived), out.expand_x.rows(0, all));
    if (own_scales) all_gather(group_tp, own_scales.view().rows(0, arrived), out.dynamic_scales.rows(0, all));
  });
}

}  // namespace expar::ascend
