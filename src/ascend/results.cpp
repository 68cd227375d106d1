// The way of the experts' results back to their tokens.
#include "src/ascend/results.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "src/ascend/comm_quant.h"
#include "src/ascend/elements.h"
#include "src/ascend/limits.h"

namespace expar::ascend {
namespace {

/// The rank that each row of expand_x came from.
std::vector<std::int32_t> sources_of(const Domain& domain, const Returned& returned, const char* name) {
  const auto* const prefix = returned.prefix.as<std::int32_t>();
  const std::int64_t rows = returned.expand_x.size(0);
  std::vector<std::int32_t> sources;
  const std::int64_t blocks = domain.local_expert_num(domain.ep_rank_id) * domain.ep_world_size;
  for (std::int64_t block = 0; block < blocks; ++block) {
    require_range(name, block, prefix[block], std::ssize(sources), rows);
    sources.resize(at(prefix[block]), static_cast<std::int32_t>(block % domain.ep_world_size));
  }
  return sources;
}

/// The result of each copy, in the order of y; null where it did not travel. Results stand expert by expert, in each in
/// the order in which its copies went.
std::vector<const std::byte*> results_of(const Copies& copies, const Inbox& inbox) {
  const std::vector<const std::byte*> rows = rows_of(inbox);
  std::vector<std::int64_t> first = {0};
  for (const std::int64_t count : copies.counts) first.push_back(first.back() + count);
  std::vector<const std::byte*> results(copies.expert.size(), nullptr);
  for (std::size_t copy = 0; copy < results.size(); ++copy) {
    const std::int32_t expert = copies.expert[copy];
    if (expert >= 0) results[copy] = rows[at(first[at(expert)] + copies.ordinal[copy])];
  }
  return results;
}

/// Rows made here, one for each of `count` copies that needs one: body(copy, row) fills [h] of dtype, and `results`
/// then points there.
template <class Needs, class Body>
Array make_rows(Pool& pool, std::int64_t h, DType dtype, std::vector<const std::byte*>& results, const Needs& needs,
                const Body& body) {
  std::vector<std::size_t> which;
  for (std::size_t copy = 0; copy < results.size(); ++copy) {
    if (needs(copy)) which.push_back(copy);
  }
  Array rows(dtype, {std::ssize(which), h});
  pool.run(std::ssize(which), [&](std::int64_t i, int) {
    const Tensor row = rows.view().rows(i, 1);
    body(which[at(i)], row);
    results[which[at(i)]] = row.bytes();
  });
  return rows;
}

/// [BS, H] in f32.
Array widened(ConstTensor rows) {
  if (rows.absent()) return {};
  Array wide(DType::f32, rows.shape());
  for (std::int64_t i = 0; i < rows.elements(); ++i) wide.as<float>()[i] = number(rows, i);
  return wide;
}

/// a1 x + a2 v, with (a1, a2) = softmax(<alpha_1, x>, <alpha_2, x>); sums in index order.
void constant(const NoRank& experts, std::int64_t c, ConstTensor x, Tensor row) {
  const std::int64_t h = row.elements(), first = c * h;
  float dot_1 = 0, dot_2 = 0;
  for (std::int64_t i = 0; i < h; ++i) {
    dot_1 += number(experts.alpha_1, first + i) * number(x, i);
    dot_2 += number(experts.alpha_2, first + i) * number(x, i);
  }
  const float most = std::max(dot_1, dot_2), e_1 = std::exp(dot_1 - most), e_2 = std::exp(dot_2 - most);
  for (std::int64_t i = 0; i < h; ++i)
    row.as<float>()[i] = e_1 / (e_1 + e_2) * number(x, i) + e_2 / (e_1 + e_2) * number(experts.v, first + i);
}

}  // namespace

Mail write_results(const Context& group_ep, const Domain& domain, const Returned& returned, const char* name,
                   Tensor quant) {
  const ConstTensor& expand_x = returned.expand_x;
  if (returned.comm_quant_mode != 0 && returned.comm_quant_mode != 2)
    refuse("comm_quant_mode is " + std::to_string(returned.comm_quant_mode) + ", should be 0 or 2");
  check_ids(domain, returned.expert_ids, std::numeric_limits<std::int32_t>::max());
  const std::int64_t rows = check_rows(domain, expand_x, returned.expert_ids), h = expand_x.size(1);
  if (expand_x.dtype() != DType::f16 && expand_x.dtype() != DType::bf16)
    refuse("expand_x is " + shown(expand_x) + ", should be f16 or bf16 [A, H]");
  require_range("H", h, 1024, 8192);
  std::vector<std::int32_t> sources = sources_of(domain, returned, name);
  const std::int64_t sent = std::ssize(sources);
  ConstTensor posted = expand_x;
  if (returned.comm_quant_mode == 2) {
    require("quant_expand_x", quant, DType::int8, {rows, quant_expand_bytes(h)});
    if (reinterpret_cast<std::uintptr_t>(quant.data()) % alignof(bf16) != 0)
      refuse("quant_expand_x begins at an odd address");
    comm_quantise(group_ep.pool(), expand_x.rows(0, sent), quant);
    posted = quant;
  }
  std::vector<std::int64_t> first_experts(at(domain.ep_world_size + 1));
  for (std::int64_t rank = 0; rank <= domain.ep_world_size; ++rank) first_experts[at(rank)] = rank;
  const auto most = [&](std::int64_t rank) {
    return expand_rows(domain, rank, returned.expert_ids.size(0), returned.expert_ids.size(1));
  };
  return {.rows = posted.rows(0, sent),
          .experts = std::move(sources),
          .first_experts = std::move(first_experts),
          .bound = std::max(most(0), most(domain.ep_world_size - 1)),
          .alike = numbers_of(returned),
          .own = own_numbers(domain, returned.expert_ids.size(0))};
}

std::vector<NamedNumber> numbers_of(const Returned& returned) {
  return {{"H", returned.expand_x.size(1)},
          {"expand_x", static_cast<std::int64_t>(returned.expand_x.dtype())},
          {"comm_quant_mode", returned.comm_quant_mode},
          {"K", returned.expert_ids.size(1)}};
}

ConstTensor flat(const char* name, ConstTensor tensor, ConstTensor out) {
  if (tensor.absent()) return {};
  const Shape& shape = tensor.shape();
  const bool folded = shape.rank() == 3 && shape[0] * shape[1] == out.size(0) && shape[2] == out.size(1);
  require(name, tensor, out.dtype(), folded ? shape : out.shape());
  return {tensor.data(), tensor.dtype(), out.shape()};
}

void check_results(const Domain& domain, const Copies& copies, const Inbox& inbox) {
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

void sum_results(const Context& context, const Domain& domain, const Copies& copies, const Inbox& inbox,
                 std::int64_t comm_quant_mode, const Summed& summed, Tensor out) {
  Pool& pool = context.pool();
  const std::int64_t h = out.size(1);
  const NoRank& own = summed.no_rank;
  std::vector<const std::byte*> results = results_of(copies, inbox);
  const auto came = [&](std::size_t copy) { return results[copy] != nullptr; };
  Array decoded, wide_rows;
  if (comm_quant_mode == 2) {
    decoded = make_rows(pool, h, out.dtype(), results, came,
                        [&](std::size_t copy, Tensor row) { comm_dequantise(results[copy], row); });
  }
  // The kernels sum f32 and bf16: f16 is widened, and so is all beside constants, which are not rounded.
  const bool wide = out.dtype() == DType::f16 || own.constant > 0;
  if (wide) {
    wide_rows = make_rows(pool, h, DType::f32, results, came, [&](std::size_t copy, Tensor row) {
      const ConstTensor narrow(results[copy], out.dtype(), {h});
      for (std::int64_t i = 0; i < h; ++i) row.as<float>()[i] = number(narrow, i);
    });
  }
  const Array wide_x = wide ? widened(own.ori_x) : Array();
  const ConstTensor x = wide ? ConstTensor(wide_x) : own.ori_x;
  const auto* const ids = summed.expert_ids.as<std::int32_t>();
  const std::int64_t copied = domain.moe_expert_num + own.zero, constant_from = copied + own.copy;
  const auto is = [&](std::size_t copy, std::int64_t first, std::int64_t count) {
    return copy < copies.counted.size() && copies.counted[copy] != 0 && ids[copy] >= first && ids[copy] < first + count;
  };
  const auto x_of = [&](std::size_t slot) { return x.rows(static_cast<std::int64_t>(slot) / copies.topk, 1); };
  for (std::size_t slot = 0; slot < copies.counted.size(); ++slot) {
    if (is(slot, copied, own.copy)) results[slot] = x_of(slot).bytes();
  }
  const Array constants = make_rows(
      pool, h, DType::f32, results, [&](std::size_t copy) { return is(copy, constant_from, own.constant); },
      [&](std::size_t slot, Tensor row) { constant(own, ids[slot] - constant_from, x_of(slot), row); });

  const std::int64_t per_token = copies.per_token();
  std::vector<const void*> slots(results.size(), nullptr);
  std::vector<float> weights(results.size(), 1.0F);
  for (std::int64_t t = 0; t < copies.tokens; ++t) {
    if (copies.active[at(t)] == 0) continue;
    const std::int64_t first = t * per_token;
    for (std::int64_t k = 0; k < copies.topk; ++k) {
      slots[at(first + k)] = results[at(copies.of_slot(t, k))];
      if (!summed.expert_scales.absent())
        weights[at(first + k)] = summed.expert_scales.as<float>()[copies.of_slot(t, k)];
    }
    for (std::int64_t j = 0; j < copies.shared; ++j)
      slots[at(first + copies.topk + j)] = results[at(copies.of_shared(j, t))];
  }
  const Array shared = widened(summed.shared_expert_x), wide_residual = wide ? widened(summed.residual) : Array(),
              wide_out = wide ? Array(DType::f32, out.shape()) : Array();
  const Tensor sums = wide ? wide_out.view() : out;
  context.kernels().reduce({.tokens = copies.tokens,
                            .topk = per_token,
                            .width = h,
                            .dtype = sums.dtype(),
                            .slots = slots.data(),
                            .weights = weights.data(),
                            .shared = shared ? shared.as<float>() : nullptr,
                            .residual = wide ? wide_residual.view().data() : summed.residual.data(),
                            .out = sums.data()},
                           pool);
  for (std::int64_t i = 0; wide && i < out.elements(); ++i) set_number(out, i, sums.as<float>()[i]);
}

}  // namespace expar::ascend
