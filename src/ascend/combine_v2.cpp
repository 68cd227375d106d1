// moe_distribute_combine_v2, and with the norm that follows.
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <expar/collectives.h>
#include <expar/norm.h>

#include "src/ascend/elements.h"
#include "src/ascend/limits.h"
#include "src/ascend/results.h"
#include "src/ascend/v2.h"

namespace expar::ascend {
namespace {

/// The results of this rank's rows [n, H]: the tp ranks' parts summed, in their order, in f32, and rounded.
void sum_parts(const Context& group_tp, ConstTensor parts, ConstTensor tp_send_counts, Tensor out) {
  const auto* const counts = tp_send_counts.as<std::int32_t>();
  const std::vector<std::int64_t> send = {counts[0], counts[1]};
  const std::int64_t rows = send[at(group_tp.rank())], h = out.size(1);
  const Array received(parts.dtype(), {2 * rows, h});
  all_to_all_v(group_tp, parts.rows(0, send[0] + send[1]), send, received, std::vector<std::int64_t>{rows, rows});
  for (std::int64_t i = 0; i < rows * h; ++i) set_number(out, i, number(received, i) + number(received, rows * h + i));
}

void check_no_rank(const NoRank& own, const Shape& rows, DType dtype) {
  if (own.copy + own.constant > 0) require("ori_x", own.ori_x, dtype, rows);
  if (own.constant == 0) return;
  const Shape each{own.constant, rows[1]};
  require("const_expert_alpha_1", own.alpha_1, dtype, each);
  require("const_expert_alpha_2", own.alpha_2, dtype, each);
  require("const_expert_v", own.v, dtype, each);
}

void combine(const Context& group_ep, const Domain& domain, const V2Options& options, const CombineV2& in,
             ConstTensor residual, Tensor out, const std::function<void()>& check) {
  const std::int64_t tp = tp_ranks(options);
  Array summed_parts;
  ConstTensor expand_x = in.expand_x;
  std::optional<Error> failure;  // of the tp ranks: told to the ep ranks when they meet
  if (tp > 1) {
    try {
      with_tp(
          options,
          [&] {
            ranks_left(group_ep, domain, options);
            require("tp_send_counts", in.tp_send_counts, DType::int32, {tp});
            require_axes("expand_x", in.expand_x, 2);
            const auto* const counts = in.tp_send_counts.as<std::int32_t>();
            for (std::int64_t part = 0; part < tp; ++part)
              require_range("tp_send_counts", part, counts[part], 0, in.expand_x.size(0) / tp);
            require_numbers("expand_x", in.expand_x);
            summed_parts = Array(in.expand_x.dtype(), {in.expand_x.size(0) / tp, in.expand_x.size(1)});
          },
          [&] { sum_parts(*options.group_tp, in.expand_x, in.tp_send_counts, summed_parts); });
      expand_x = summed_parts;
    } catch (...) {
      failure = current_error();
    }
  }

  Left left;
  Copies copies;
  ConstTensor shared_expert_x;
  Array quant;
  const NoRank own{options.zero_expert_num, options.copy_expert_num, options.const_expert_num, in.ori_x,
                   in.const_expert_alpha_1, in.const_expert_alpha_2, in.const_expert_v};
  const Inbox inbox = exchange(group_ep, options, [&] {
    if (failure) throw Error(*failure);
    check();
    left = ranks_left(group_ep, domain, options);
    const Domain& d = left.domain;
    copies = copies_of(d, options, in.expert_ids);
    const std::int64_t blocks = d.local_expert_num(d.ep_rank_id) * d.ep_world_size;
    require("ep_send_counts", in.ep_send_counts, DType::int32, {blocks * tp});
    require("out", out, expand_x.dtype(), {copies.tokens, expand_x.size(1)});
    if (!in.expert_scales.absent())
      require("expert_scales", in.expert_scales, DType::f32, {copies.tokens, copies.topk});
    if (!in.shared_expert_x.absent())
      require_range("shared_expert_rank_num beside shared_expert_x", d.shared_expert_rank_num, 0, 0);
    shared_expert_x = flat("shared_expert_x", in.shared_expert_x, out);
    check_no_rank(own, out.shape(), out.dtype());
    if (in.comm_quant_mode == 2) quant = Array(DType::int8, {expand_x.size(0), quant_expand_bytes(expand_x.size(1))});
    const ConstTensor counts = in.ep_send_counts.rows(tp > 1 ? options.tp_rank_id * blocks : 0, blocks);
    return write_results(group_ep, d, {expand_x, in.expert_ids, counts, in.comm_quant_mode}, "ep_send_counts", quant);
  });
  check_results(left.domain, copies, inbox);
  sum_results(group_ep, left.domain, copies, inbox, in.comm_quant_mode,
              {in.expert_ids, in.expert_scales, shared_expert_x, residual, own}, out);
}

}  // namespace

void moe_distribute_combine_v2(const Context& group_ep, const Domain& domain, const V2Options& options,
                               const CombineV2& in, Tensor out) {
  combine(group_ep, domain, options, in, {}, out, [] {});
}

void moe_distribute_combine_add_rms_norm(const Context& group_ep, const Domain& domain, const V2Options& options,
                                         const CombineV2& in, const CombineAddRmsNorm& norm, Tensor y, Tensor rstd,
                                         Tensor x) {
  const Shape rows = in.expert_ids.shape().rank() == 2 && in.expand_x.shape().rank() == 2
                         ? Shape{in.expert_ids.size(0), in.expand_x.size(1)}
                         : Shape{0, 0};
  const Tensor out(x.data(), x.dtype(), rows);
  combine(group_ep, domain, options, in, ConstTensor(norm.residual_x.data(), DType::bf16, rows), out, [&] {
    const Shape each{rows[0], 1, rows[1]};
    require("residual_x", norm.residual_x, DType::bf16, each);
    require("gamma", norm.gamma, DType::bf16, {rows[1]});
    require("x", x, DType::bf16, each);
    require("y", y, DType::bf16, each);
    if (!(norm.norm_eps >= 0)) refuse("norm_eps is " + std::to_string(norm.norm_eps) + ", should be at least 0");
    require("rstd", rstd, DType::f32, {rows[0], 1, 1});
  });
  const Array gain(DType::f32, norm.gamma.shape());
  for (std::int64_t i = 0; i < rows[1]; ++i) gain.as<float>()[i] = number(norm.gamma, i);
  rms_norm(group_ep, out,
           {.gain = gain,
            .epsilon = norm.norm_eps,
            .y = Tensor(y.data(), y.dtype(), rows),
            .scale = Tensor(rstd.data(), rstd.dtype(), {rows[0]})});
}

}  // namespace expar::ascend
