// Rows to the order of their experts and back.
#include <expar/ascend/permutation.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include <expar/permute.h>

#include "src/ascend/order.h"
#include "src/util/copy.h"

namespace expar::ascend {
namespace {

/// The row of each slot of N tokens, from `rows` on dropped. Throws unless they are of 0 to N K - 1, where they are
/// `all` each of them once.
class SlotRows {
 public:
  SlotRows(const ConstTensor& sorted_indices, std::int64_t tokens, std::int64_t rows, bool all)
      : rows_(sorted_indices.as<std::int32_t>()), slots_(sorted_indices.elements()), kept_(rows) {
    if (tokens == 0 ? slots_ != 0 : slots_ % tokens != 0) {
      refuse("sorted_indices has " + std::to_string(slots_) + " elements, no multiple of the " +
             std::to_string(tokens) + " tokens");
    }
    if (all) require_range("the rows of permuted_tokens", rows, 0, slots_);
    std::vector<bool> seen(at(all ? slots_ : 0));
    for (std::int64_t i = 0; i < slots_; ++i) {
      require_range("sorted_indices", i, rows_[i], 0, slots_ - 1);
      if (!all) continue;
      if (seen[at(rows_[i])]) {
        refuse("sorted_indices[" + std::to_string(i) + "] is " + std::to_string(rows_[i]) + ", which is there already");
      }
      seen[at(rows_[i])] = true;
    }
    topk_ = tokens == 0 ? 1 : slots_ / tokens;
  }

  std::int64_t slots() const { return slots_; }
  std::int64_t topk() const { return topk_; }
  bool is_kept(std::int64_t slot) const { return rows_[slot] < kept_; }
  std::int64_t operator[](std::int64_t slot) const { return rows_[slot]; }

 private:
  const std::int32_t* rows_;
  std::int64_t slots_, kept_, topk_ = 1;
};

void check_rows(const char* what, const ConstTensor& rows, const ConstTensor& sorted_indices) {
  require_axes(what, rows, 2);
  require_rows(what, rows);
  require_axes("sorted_indices", sorted_indices, 1);
  require("sorted_indices", sorted_indices, DType::int32, sorted_indices.shape());
}

/// The tokens of an unpermutation: those of the probs, or one per slot.
std::int64_t tokens_of(const ConstTensor& sorted_indices, const ConstTensor& probs) {
  if (probs.absent()) return sorted_indices.size(0);
  require_axes("probs", probs, 2);
  require_numbers("probs", probs);
  if (probs.elements() != sorted_indices.size(0)) {
    refuse("probs is " + shown(probs) + ", should have the " + std::to_string(sorted_indices.size(0)) +
           " elements of sorted_indices");
  }
  return probs.size(0);
}

std::vector<float> numbers(const ConstTensor& tensor) {
  std::vector<float> all(at(tensor.absent() ? 0 : tensor.elements()));
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = number(tensor, static_cast<std::int64_t>(i));
  return all;
}

/// The sum of each token's rows, by weight if there are weights.
Array sum_of_rows(const Context& context, const ConstTensor& rows, const SlotRows& slots, std::int64_t tokens,
                  const float* weights) {
  const std::int64_t width = rows.size(1);
  const std::int64_t row_bytes = width * static_cast<std::int64_t>(size_of(rows.dtype()));
  std::vector<const void*> pointers(at(slots.slots()));
  for (std::int64_t i = 0; i < slots.slots(); ++i) {
    pointers[at(i)] = slots.is_kept(i) ? rows.bytes() + slots[i] * row_bytes : nullptr;
  }
  Array out(rows.dtype(), {tokens, width});
  context.kernels().reduce({.tokens = tokens,
                            .topk = slots.topk(),
                            .width = width,
                            .dtype = rows.dtype(),
                            .slots = pointers.data(),
                            .weights = weights,
                            .out = out.view().data()},
                           context.pool());
  return out;
}

}  // namespace

TokenPermutation moe_token_permute(ConstTensor tokens, ConstTensor indices, std::int64_t num_out_tokens) {
  require_axes("tokens", tokens, 2);
  require_integers("indices", indices);
  if (indices.shape().rank() != 1) require_axes("indices", indices, 2);
  if (indices.size(0) != tokens.size(0)) {
    refuse("indices is " + shown(indices) + ", should have a row for each of the " + std::to_string(tokens.size(0)) +
           " tokens");
  }
  const std::int64_t slots = indices.elements(), topk = indices.shape().rank() == 2 ? indices.size(1) : 1;
  require_range("the elements of indices", slots, 0, kMaxSlots);
  const std::vector<std::int32_t> order = sorted_order(integers(indices));
  const std::int64_t rows =
      num_out_tokens > 0 ? std::min(num_out_tokens, slots) : std::max<std::int64_t>(slots + num_out_tokens, 0);
  TokenPermutation permutation{Array(tokens.dtype(), {rows, tokens.size(1)}), Array(DType::int32, {slots})};
  std::vector<std::int32_t> from(at(rows));
  for (std::int64_t i = 0; i < slots; ++i) {
    permutation.sorted_indices.as<std::int32_t>()[order[at(i)]] = static_cast<std::int32_t>(i);
    if (i < rows) from[at(i)] = static_cast<std::int32_t>(order[at(i)] / topk);
  }
  const std::size_t row_bytes = at(tokens.size(1)) * size_of(tokens.dtype());
  copy_rows(permutation.permuted_tokens.view().bytes(), tokens.bytes(), from, row_bytes, Store::cached);
  return permutation;
}

Array moe_token_permute_grad(const Context& context, ConstTensor permuted_tokens_grad, ConstTensor sorted_indices,
                             std::int64_t num_tokens) {
  check_rows("permuted_tokens_grad", permuted_tokens_grad, sorted_indices);
  require_range("num_tokens", num_tokens, 0, kMaxSlots);
  const SlotRows slots(sorted_indices, num_tokens, permuted_tokens_grad.size(0), true);
  return sum_of_rows(context, permuted_tokens_grad, slots, num_tokens, nullptr);
}

Array moe_token_unpermute(const Context& context, ConstTensor permuted_tokens, ConstTensor sorted_indices,
                          ConstTensor probs) {
  check_rows("permuted_tokens", permuted_tokens, sorted_indices);
  const std::int64_t tokens = tokens_of(sorted_indices, probs);
  const SlotRows slots(sorted_indices, tokens, permuted_tokens.size(0), false);
  return sum_of_rows(context, permuted_tokens, slots, tokens, probs.absent() ? nullptr : numbers(probs).data());
}

TokenUnpermuteGrad moe_token_unpermute_grad(const Context& context, ConstTensor unpermuted_tokens_grad,
                                            ConstTensor permuted_tokens, ConstTensor sorted_indices,
                                            ConstTensor probs) {
  check_rows("permuted_tokens", permuted_tokens, sorted_indices);
  const std::int64_t tokens = tokens_of(sorted_indices, probs);
  const std::int64_t rows = permuted_tokens.size(0), width = permuted_tokens.size(1);
  const SlotRows slots(sorted_indices, tokens, rows, true);
  require("unpermuted_tokens_grad", unpermuted_tokens_grad, permuted_tokens.dtype(), {tokens, width});
  std::vector<RowRef> refs(at(rows));
  std::vector<float> weights(refs.size(), 1.0F);
  for (std::int64_t i = 0; i < slots.slots(); ++i) {
    if (!slots.is_kept(i)) continue;
    refs[at(slots[i])].row = static_cast<std::int32_t>(i / slots.topk());
    if (!probs.absent()) weights[at(slots[i])] = number(probs, i);
  }
  TokenUnpermuteGrad grad{Array(permuted_tokens.dtype(), {rows, width}), {}};
  std::vector<float> dots(at(rows));
  context.kernels().gather({.rows = {.base = {unpermuted_tokens_grad.data(), nullptr},
                                     .dtype = permuted_tokens.dtype(),
                                     .width = width,
                                     .refs = refs.data()},
                            .count = rows,
                            .weights = probs.absent() ? nullptr : weights.data(),
                            .out = grad.permuted_tokens_grad.view().data(),
                            .other = probs.absent() ? nullptr : permuted_tokens.data(),
                            .dot = dots.data()},
                           context.pool());
  if (probs.absent()) return grad;
  grad.probs_grad = Array(probs.dtype(), probs.shape());
  for (std::int64_t i = 0; i < slots.slots(); ++i) {
    set_number(grad.probs_grad, i, slots.is_kept(i) ? dots[at(slots[i])] : 0);
  }
  return grad;
}

ReRouting moe_re_routing(ConstTensor tokens, ConstTensor expert_token_num_per_rank, const ReRoutingOptions& options) {
  const ConstTensor& counts = expert_token_num_per_rank;
  const ConstTensor& scales = options.per_token_scales;
  require_axes("tokens", tokens, 2);
  require_axes("expert_token_num_per_rank", counts, 2);
  require_integers("expert_token_num_per_rank", counts);
  require_range("the ranks of expert_token_num_per_rank", counts.size(0), 1, kMaxSlots);
  require_range("expert_token_num_type", options.expert_token_num_type, 0, 1);
  require_range("idx_type", options.idx_type, 0, 1);
  const std::vector<std::int64_t> numbers = integers(counts);
  for (std::int64_t i = 0; i < counts.elements(); ++i) {
    require_range("expert_token_num_per_rank", i / counts.size(1), i % counts.size(1), numbers[at(i)], 0, kMaxSlots);
  }
  std::int64_t rows = 0;
  for (const std::int64_t count : numbers) rows = std::min(rows + count, kMaxSlots);
  if (tokens.size(0) != rows) {
    refuse("tokens is " + shown(tokens) + ", should have the " + std::to_string(rows) +
           " rows that expert_token_num_per_rank counts");
  }
  const ExpertMajor order = expert_major(numbers, static_cast<int>(counts.size(0)));
  ReRouting routing;
  routing.permute_tokens = Array(tokens.dtype(), tokens.shape());
  permute_rows(tokens, order.indices, routing.permute_tokens);
  if (!scales.absent()) {
    if (scales.shape().rank() == 0 || scales.size(0) != rows) {
      refuse("per_token_scales is " + shown(scales) + ", should have a row for each of the " + std::to_string(rows) +
             " tokens");
    }
    routing.permute_per_token_scales = Array(scales.dtype(), scales.shape());
    permute_rows(scales, order.indices, routing.permute_per_token_scales);
  }
  routing.permute_token_idx = Array(DType::int32, {rows});
  std::int32_t* const places = routing.permute_token_idx.as<std::int32_t>();
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int32_t old = order.indices[at(i)];
    places[options.idx_type == 0 ? i : old] = options.idx_type == 0 ? old : static_cast<std::int32_t>(i);
  }
  routing.expert_token_num = Array(counts.dtype(), {counts.size(1)});
  std::int64_t sum = 0;
  for (std::int64_t e = 0; e < counts.size(1); ++e) {
    sum += order.rows[at(e)];
    set_integer(routing.expert_token_num, e, options.expert_token_num_type == 0 ? sum : order.rows[at(e)]);
  }
  return routing;
}

Array moe_compute_expert_tokens(ConstTensor sorted_expert_for_source_row, std::int64_t num_expert) {
  const ConstTensor& sorted = sorted_expert_for_source_row;
  require_axes("sorted_expert_for_source_row", sorted, 1);
  require("sorted_expert_for_source_row", sorted, DType::int32, sorted.shape());
  require_range("the rows of sorted_expert_for_source_row", sorted.size(0), 0, kMaxSlots);
  require_range("num_expert", num_expert, 1, kMaxSlots);
  const std::int32_t* const experts = sorted.as<std::int32_t>();
  Array counts(DType::int32, {num_expert});
  for (std::int64_t i = 0; i < sorted.size(0); ++i) {
    require_range("sorted_expert_for_source_row", i, experts[i], i == 0 ? 0 : experts[i - 1], kMaxSlots);
    if (experts[i] < num_expert) ++counts.as<std::int32_t>()[experts[i]];
  }
  std::partial_sum(counts.as<std::int32_t>(), counts.as<std::int32_t>() + num_expert, counts.as<std::int32_t>());
  return counts;
}

}  // namespace expar::ascend
