// moe_distribute_combine_setup and its teardown.
#include <algorithm>
#include <string>

#include "src/ascend/comm_quant.h"
#include "src/ascend/copies.h"
#include "src/ascend/mail.h"
#include "src/ascend/ranges.h"
#include "src/util/check.h"

namespace expar::ascend {
namespace {

void check_mode(std::int64_t comm_quant_mode) {
  if (comm_quant_mode != 0 && comm_quant_mode != 2)
    refuse("comm_quant_mode = " + std::to_string(comm_quant_mode) + " is neither 0 nor 2");
}

/// The rank that each row of expand_x came from.
std::vector<std::int32_t> sources_of(const Domain& domain, ConstTensor assist_info, std::int64_t rows) {
  require("assist_info_for_combine", assist_info, DType::int32, {rows * kInfoPerRow});
  const auto* const prefix = assist_info.as<std::int32_t>();
  std::vector<std::int32_t> sources;
  const std::int64_t blocks = domain.local_expert_num(domain.ep_rank_id) * domain.ep_world_size;
  for (std::int64_t block = 0; block < blocks; ++block) {
    if (prefix[block] < std::ssize(sources) || prefix[block] > rows)
      refuse("assist_info_for_combine[" + std::to_string(block) + "] = " + std::to_string(prefix[block]) +
             " is not from " + std::to_string(sources.size()) + " to the " + std::to_string(rows) +
             " rows of expand_x: it is not that of a dispatch");
    sources.resize(at(prefix[block]), static_cast<std::int32_t>(block % domain.ep_world_size));
  }
  return sources;
}

void check_expand_x(ConstTensor expand_x) {
  if (expand_x.dtype() != DType::f16 && expand_x.dtype() != DType::bf16)
    refuse("expand_x is " + shown(expand_x) + ", should be f16 or bf16 [A, H]");
  check_range("H", expand_x.size(1), 1024, 8192);
}

Mail write(const Context& group_ep, const Domain& domain, const CombineSetup& in, Tensor quant_expand_x) {
  check_domain(group_ep, domain);
  check_mode(in.comm_quant_mode);
  const std::int64_t rows = check_rows(domain, in.expand_x, in.expert_ids);
  check_expand_x(in.expand_x);
  std::vector<std::int32_t> sources = sources_of(domain, in.assist_info_for_combine, rows);
  const std::int64_t h = in.expand_x.size(1), sent = std::ssize(sources);
  ConstTensor posted = in.expand_x;
  if (in.comm_quant_mode == 2) {
    require("quant_expand_x", quant_expand_x, DType::int8, {rows, quant_expand_bytes(h)});
    comm_quantise(group_ep.pool(), in.expand_x.rows(0, sent), quant_expand_x);
    posted = quant_expand_x;
  }
  std::vector<std::int64_t> first_experts(at(domain.ep_world_size + 1));
  for (std::int64_t rank = 0; rank <= domain.ep_world_size; ++rank) first_experts[at(rank)] = rank;
  const auto most = [&](std::int64_t rank) {
    return expand_rows(domain, rank, in.expert_ids.size(0), in.expert_ids.size(1));
  };
  return {.rows = posted.rows(0, sent),
          .experts = std::move(sources),
          .first_experts = std::move(first_experts),
          .bound = std::max(most(0), most(domain.ep_world_size - 1)),
          .alike = {in.comm_quant_mode, static_cast<std::int64_t>(in.expand_x.dtype()), in.expert_ids.size(1)}};
}

/// Throws unless the results are those of the copies that expert_ids asks for.
void check_results(const Domain& domain, const CombineTeardown& in, const Copies& copies, const Inbox& inbox) {
  const auto* const ordinals = in.expand_idx.as<std::int32_t>();
  for (std::int64_t slot = 0; slot < copies.tokens * copies.topk; ++slot) {
    if (ordinals[slot] == copies.ordinal[at(slot)]) continue;
    refuse("expand_idx[" + std::to_string(slot) + "] = " + std::to_string(ordinals[slot]) + ", of these expert_ids " +
           std::to_string(copies.ordinal[at(slot)]));
  }
  const std::vector<std::int64_t> first = first_experts_of(domain);
  for (std::int64_t rank = 0; rank < domain.ep_world_size; ++rank) {
    std::int64_t asked = 0;
    for (std::int64_t e = first[at(rank)]; e < first[at(rank + 1)]; ++e) asked += copies.counts[at(e)];
    const std::int64_t came = inbox.plan().counts()[at(rank * domain.ep_world_size + domain.ep_rank_id)];
    if (asked != came)
      refuse("rank " + std::to_string(rank) + " returned " + std::to_string(came) + " rows, expert_ids asks for " +
             std::to_string(asked) + ": they are not those of the dispatch");
  }
}

/// The result of each copy, in the order of y; null where it did not travel. Results stand expert by expert, in each in
/// the order in which its copies went.
std::vector<const void*> results_of(const Copies& copies, const std::vector<const std::byte*>& rows) {
  std::vector<std::int64_t> first = {0};
  for (const std::int64_t count : copies.counts) first.push_back(first.back() + count);
  std::vector<const void*> results(copies.expert.size(), nullptr);
  for (std::size_t copy = 0; copy < results.size(); ++copy) {
    const std::int32_t expert = copies.expert[copy];
    if (expert >= 0) results[copy] = rows[at(first[at(expert)] + copies.ordinal[copy])];
  }
  return results;
}

/// The rows, each turned into [h] of dtype by body(row, to); `rows` then points to those.
template <class Body>
Array convert_rows(Pool& pool, std::int64_t h, DType dtype, std::vector<const std::byte*>& rows, const Body& body) {
  Array converted(dtype, {std::ssize(rows), h});
  pool.run(std::ssize(rows), [&](std::int64_t i, int) {
    const Tensor to = converted.view().rows(i, 1);
    body(rows[at(i)], to);
    rows[at(i)] = to.bytes();
  });
  return converted;
}

void widen(const std::byte* from, Tensor to) {
  const auto* const values = reinterpret_cast<const f16*>(from);
  for (std::int64_t i = 0; i < to.elements(); ++i) to.as<float>()[i] = static_cast<float>(values[i]);
}

/// out [BS, H] = each token's results in the order of its slots, then of its shared experts, then `last`, if it is
/// there.
void sum(const Context& context, const Copies& copies, const std::vector<const void*>& results,
         const float* expert_scales, ConstTensor last, Tensor out) {
  const std::int64_t per_token = copies.per_token();
  std::vector<const void*> slots(results.size(), nullptr);
  std::vector<float> weights(results.size(), 1.0F);
  for (std::int64_t t = 0; t < copies.active; ++t) {
    const void** const slot = &slots[at(t * per_token)];
    for (std::int64_t k = 0; k < copies.topk; ++k) slot[k] = results[at(copies.of_slot(t, k))];
    for (std::int64_t j = 0; j < copies.shared; ++j) slot[copies.topk + j] = results[at(copies.of_shared(j, t))];
    std::copy_n(expert_scales + copies.of_slot(t, 0), copies.topk, &weights[at(t * per_token)]);
  }
  context.kernels().reduce({.tokens = copies.tokens,
                            .topk = per_token,
                            .width = out.size(1),
                            .dtype = out.dtype(),
                            .slots = slots.data(),
                            .weights = weights.data(),
                            .residual = last.data(),
                            .out = out.data()},
                           context.pool());
}

}  // namespace

CommCmdInfo moe_distribute_combine_setup(const Context& group_ep, const Domain& domain, const CombineSetup& in,
                                         Tensor quant_expand_x) {
  return post(group_ep, [&] { return write(group_ep, domain, in, quant_expand_x); });
}

void moe_distribute_combine_teardown(const Context& group_ep, const Domain& domain, const CombineTeardown& in,
                                     CommCmdInfo comm_cmd_info, Tensor out) {
  const Inbox inbox = comm_cmd_info.take();
  const Copies copies = copies_of(domain, in.expert_ids, in.x_active_mask);
  check_mode(in.comm_quant_mode);
  check_expand_x(in.expand_x);
  const std::int64_t h = in.expand_x.size(1);
  const DType dtype = in.expand_x.dtype();
  const ConstTensor& posted = in.comm_quant_mode == 2 ? in.quant_expand_x : in.expand_x;
  if (posted.data() != inbox.gathered().base[0] ||
      at(posted.size(1)) * size_of(posted.dtype()) != at(inbox.rows().size(1)) * 2)
    refuse("expand_x, quant_expand_x and comm_quant_mode are not those of the setup");
  require("expand_idx", in.expand_idx, DType::int32, {copies.tokens * copies.topk});
  require("expert_scales", in.expert_scales, DType::f32, {copies.tokens, copies.topk});
  require("out", out, dtype, {copies.tokens, h});
  if (!in.shared_expert_x.absent()) {
    check_range("shared_expert_num beside shared_expert_x", domain.shared_expert_num, 0, 0);
    require("shared_expert_x", in.shared_expert_x, dtype, {copies.tokens, h});
  }
  check_results(domain, in, copies, inbox);

  std::vector<const std::byte*> rows = rows_of(inbox);
  const float* const scales = in.expert_scales.as<float>();
  Array decoded;
  if (in.comm_quant_mode == 2) decoded = convert_rows(group_ep.pool(), h, dtype, rows, comm_dequantise);
  if (dtype == DType::bf16) return sum(group_ep, copies, results_of(copies, rows), scales, in.shared_expert_x, out);
  // The kernels sum f32 and bf16: f16 is widened, and rounded once in the end.
  const Array wide_rows = convert_rows(group_ep.pool(), h, DType::f32, rows, widen), wide(DType::f32, out.shape());
  Array last;
  if (!in.shared_expert_x.absent()) {
    last = Array(DType::f32, out.shape());
    widen(in.shared_expert_x.bytes(), last);
  }
  sum(group_ep, copies, results_of(copies, rows), scales, last, wide);
  for (std::int64_t i = 0; i < out.elements(); ++i) out.as<f16>()[i] = f16(wide.as<float>()[i]);
}

}  // namespace expar::ascend
