// include/expar/ascend/permutation.h
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "python/src/ascend/ascend.h"

namespace expar::python {
namespace {

void bind_permutation(nb::module_& m) {
  m.def(
      "_ascend_moe_token_permute",
      [](const In& tokens, const In& indices, std::int64_t num_out_tokens) {
        ascend::TokenPermutation out = released([&] {
          return ascend::moe_token_permute(read(tokens, "tokens"), read(indices, "indices"), num_out_tokens);
        });
        return std::pair(given(std::move(out.permuted_tokens)), given(std::move(out.sorted_indices)));
      },
      "tokens"_a, "indices"_a, "num_out_tokens"_a, "permuted_tokens, sorted_indices.");
  m.def(
      "_ascend_moe_token_permute_grad",
      [](const Context& c, const In& grad, const In& sorted_indices, std::int64_t num_tokens) {
        return given(released([&] {
          return ascend::moe_token_permute_grad(c, read(grad, "permuted_tokens_grad"),
                                                read(sorted_indices, "sorted_indices"), num_tokens);
        }));
      },
      "context"_a, "permuted_tokens_grad"_a, "sorted_indices"_a, "num_tokens"_a, "The gradient of the tokens.");
  m.def(
      "_ascend_moe_token_unpermute",
      [](const Context& c, const In& permuted_tokens, const In& sorted_indices, const In& probs) {
        return given(released([&] {
          return ascend::moe_token_unpermute(c, read(permuted_tokens, "permuted_tokens"),
                                             read(sorted_indices, "sorted_indices"), read(probs, "probs"));
        }));
      },
      "context"_a, "permuted_tokens"_a, "sorted_indices"_a, "probs"_a.none(), "The tokens, their rows summed.");
  m.def(
      "_ascend_moe_token_unpermute_grad",
      [](const Context& c, const In& grad, const In& permuted_tokens, const In& sorted_indices, const In& probs) {
        ascend::TokenUnpermuteGrad out = released([&] {
          return ascend::moe_token_unpermute_grad(c, read(grad, "unpermuted_tokens_grad"),
                                                  read(permuted_tokens, "permuted_tokens"),
                                                  read(sorted_indices, "sorted_indices"), read(probs, "probs"));
        });
        return std::pair(given(std::move(out.permuted_tokens_grad)), given(std::move(out.probs_grad)));
      },
      "context"_a, "unpermuted_tokens_grad"_a, "permuted_tokens"_a, "sorted_indices"_a, "probs"_a.none(),
      "permuted_tokens_grad and, with probs, probs_grad.");
}

void bind_routing(nb::module_& m) {
  m.def(
      "_ascend_moe_re_routing",
      [](const In& tokens, const In& counts, const In& per_token_scales, std::int64_t expert_token_num_type,
         std::int64_t idx_type) {
        ascend::ReRouting out = released([&] {
          return ascend::moe_re_routing(read(tokens, "tokens"), read(counts, "expert_token_num_per_rank"),
                                        {.per_token_scales = read(per_token_scales, "per_token_scales"),
                                         .expert_token_num_type = expert_token_num_type,
                                         .idx_type = idx_type});
        });
        return std::tuple(given(std::move(out.permute_tokens)), given(std::move(out.permute_per_token_scales)),
                          given(std::move(out.permute_token_idx)), given(std::move(out.expert_token_num)));
      },
      "tokens"_a, "expert_token_num_per_rank"_a, nb::kw_only(), "per_token_scales"_a.none(), "expert_token_num_type"_a,
      "idx_type"_a, "permute_tokens, permute_per_token_scales, permute_token_idx, expert_token_num.");
  m.def(
      "_ascend_moe_finalize_routing",
      [](const Context& c, const In& rows, const In& skip1, const In& skip2, const In& bias, const In& scales,
         const In& row_of, const In& expert_of, std::int64_t drop_pad_mode) {
        return given(released([&] {
          return ascend::moe_finalize_routing(c, {.expanded_permuted_rows = read(rows, "expanded_permuted_rows"),
                                                  .skip1 = read(skip1, "skip1"),
                                                  .skip2 = read(skip2, "skip2"),
                                                  .bias = read(bias, "bias"),
                                                  .scales = read(scales, "scales"),
                                                  .expanded_src_to_dst_row = read(row_of, "expanded_src_to_dst_row"),
                                                  .expert_for_source_row = read(expert_of, "export_for_source_row"),
                                                  .drop_pad_mode = drop_pad_mode});
        }));
      },
      "context"_a, "expanded_permuted_rows"_a, "skip1"_a.none(), "skip2"_a.none(), "bias"_a.none(), "scales"_a.none(),
      "expanded_src_to_dst_row"_a, "export_for_source_row"_a.none(), "drop_pad_mode"_a,
      "The tokens, their rows summed with weights, a bias of their experts and what is skipped.");
  m.def(
      "_ascend_moe_compute_expert_tokens",
      [](const In& experts, std::int64_t num_expert) {
        return given(released([&] {
          return ascend::moe_compute_expert_tokens(read(experts, "sorted_expert_for_source_row"), num_expert);
        }));
      },
      "sorted_expert_for_source_row"_a, "num_expert"_a, "Rows of experts up to each.");
}

}  // namespace

void bind_ascend_permutation(nb::module_& m) {
  bind_permutation(m);
  bind_routing(m);
}

}  // namespace expar::python
