// The routers of Ascend: scores by the library's router, then the choice among groups as the operators have it.
#include <expar/ascend/gating.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <expar/router.h>

#include "src/ascend/elements.h"
#include "src/util/ranges.h"
#include "src/util/top_k.h"

namespace expar::ascend {
namespace {

constexpr std::int64_t kGrain = 64;  // tokens per task

void check_logits(const ConstTensor& x) {
  require_axes("x", x, 2);
  require_numbers("x", x);
  require_range("E of x", x.size(1), 1, std::numeric_limits<std::int32_t>::max());
}

void check(const ConstTensor& x, std::int64_t k, const GatingOptions& options) {
  check_logits(x);
  const std::int64_t tokens = x.size(0), experts = x.size(1);
  require_range("group_select_mode", options.group_select_mode, 0, 1);
  require_range("renorm", options.renorm, 0, 1);
  require_range("norm_type", options.norm_type, 0, 1);
  require_range("group_count", options.group_count, 1, experts);
  if (experts % options.group_count != 0) {
    refuse("group_count is " + std::to_string(options.group_count) + ", should divide the " + std::to_string(experts) +
           " experts of x");
  }
  require_range("k_group", options.k_group, 1, options.group_count);
  require_range("k", k, 1, experts / options.group_count * options.k_group);
  if (!options.bias.absent()) {
    require_numbers("bias", options.bias);
    require("bias", options.bias, options.bias.dtype(), {experts});
  }
  if (options.input_ids.absent() != options.tid2eid.absent()) {
    refuse(options.tid2eid.absent() ? "input_ids is given without tid2eid" : "tid2eid is given without input_ids");
  }
  if (options.tid2eid.absent()) return;
  if (!options.bias.absent() || options.group_count > 1) refuse("tid2eid chooses alone, without bias and groups");
  require_integers("input_ids", options.input_ids);
  require("input_ids", options.input_ids, options.input_ids.dtype(), {tokens});
  require_integers("tid2eid", options.tid2eid);
  require_axes("tid2eid", options.tid2eid, 2);
  require("tid2eid", options.tid2eid, options.tid2eid.dtype(), {options.tid2eid.size(0), k});
}

/// The experts of each token, as its table has them.
void look_up(const GatingOptions& options, std::int64_t experts, const Tensor& ids) {
  const std::int64_t topk = ids.size(1);
  for (std::int64_t n = 0; n < ids.size(0); ++n) {
    const std::int64_t token = integer(options.input_ids, n);
    require_range("input_ids", n, token, 0, options.tid2eid.size(0) - 1);
    for (std::int64_t j = 0; j < topk; ++j) {
      const std::int64_t id = integer(options.tid2eid, token * topk + j);
      require_range("tid2eid", token, j, id, 0, experts - 1);
      ids.as<std::int32_t>()[n * topk + j] = static_cast<std::int32_t>(id);
    }
  }
}

/// Chooses for one token after the other.
class Choice {
 public:
  Choice(const GatingOptions& options, std::int64_t experts, std::int64_t topk)
      : options_(options),
        size_(experts / options.group_count),
        topk_(topk),
        values_(at(experts)),
        best_(at(std::max(topk, options.k_group))),
        groups_(at(options.k_group)) {}

  void token(const float* scores, std::int32_t* ids) {
    for (std::size_t e = 0; e < values_.size(); ++e) {
      const float bias = options_.bias.absent() ? 0.0F : number(options_.bias, static_cast<std::int64_t>(e));
      const float value = scores[e] + bias;
      values_[e] = std::isnan(value) ? -std::numeric_limits<float>::infinity() : value;
    }
    TopK best_groups(options_.k_group, groups_.data(), best_.data());
    for (std::int32_t g = 0; g < options_.group_count; ++g) best_groups.offer(g, double{worth(g)});
    std::sort(groups_.begin(), groups_.end());  // so that ties go to the lower expert
    TopK top(topk_, ids, best_.data());
    for (const std::int64_t g : groups_) {
      for (std::int64_t e = g * size_; e < (g + 1) * size_; ++e) {
        top.offer(static_cast<std::int32_t>(e), double{values_[at(e)]});
      }
    }
  }

 private:
  float worth(std::int64_t group) const {
    std::int32_t ids[2];
    double best[2] = {};
    TopK top(options_.group_select_mode == 1 ? std::min<std::int64_t>(2, size_) : 1, ids, best);
    for (std::int64_t e = group * size_; e < (group + 1) * size_; ++e) top.offer(0, double{values_[at(e)]});
    return static_cast<float>(best[0]) + static_cast<float>(best[1]);
  }

  const GatingOptions& options_;
  std::int64_t size_, topk_;
  std::vector<float> values_;
  std::vector<double> best_;
  std::vector<std::int32_t> groups_;
};

void weigh(const GatingOptions& options, const float* scores, const std::int32_t* ids, std::int64_t n,
           const Tensor& y) {
  const std::int64_t topk = y.size(1);
  float sum = 0;
  for (std::int64_t j = 0; j < topk; ++j) sum += scores[ids[j]];
  const bool renormalised = options.renorm == 1 || options.norm_type == 1;
  const float divisor = renormalised ? sum + options.eps : 1.0F;
  for (std::int64_t j = 0; j < topk; ++j) {
    set_number(y, n * topk + j, scores[ids[j]] / divisor * options.routed_scaling_factor);
  }
}

}  // namespace

SoftmaxGating moe_gating_top_k_softmax(const Context& context, ConstTensor x, ConstTensor finished, std::int64_t k) {
  check_logits(x);
  const std::int64_t tokens = x.size(0), experts = x.size(1);
  require_range("k", k, 1, experts);
  if (!finished.absent()) require("finished", finished, DType::int8, {tokens});
  require_range("N k of row_idx", tokens * k, 0, std::numeric_limits<std::int32_t>::max());
  const Array logits = converted(x, DType::f32), scores(DType::f32, x.shape()), sums(DType::f32, {tokens}),
              top(DType::f32, {tokens, k});
  SoftmaxGating gating{Array(x.dtype(), {tokens, k}), Array(DType::int32, {tokens, k}),
                       Array(DType::int32, {tokens, k})};
  std::int32_t* const ids = gating.expert_idx.as<std::int32_t>();
  context.kernels().softmax_topk({.tokens = tokens,
                                  .experts = experts,
                                  .topk = k,
                                  .logits = logits.as<float>(),
                                  .scores = scores.as<float>(),
                                  .logsumexp = sums.as<float>(),
                                  .ids = ids,
                                  .top = top.as<float>()},
                                 context.pool());
  for (std::int64_t i = 0; i < tokens * k; ++i) {
    set_number(gating.y, i, top.as<float>()[i]);
    gating.row_idx.as<std::int32_t>()[i] = static_cast<std::int32_t>(i % k * tokens + i / k);
    const bool is_finished = !finished.absent() && finished.as<std::int8_t>()[i / k] != 0;
    if (is_finished) ids[i] = static_cast<std::int32_t>(experts);
  }
  return gating;
}

Gating moe_gating_top_k(const Context& context, ConstTensor x, std::int64_t k, const GatingOptions& options) {
  check(x, k, options);
  const std::int64_t tokens = x.size(0), experts = x.size(1);
  Gating gating{Array(x.dtype(), {tokens, k}), Array(DType::int32, {tokens, k}), {}};
  std::int32_t* const ids = gating.expert_idx.as<std::int32_t>();
  if (!options.tid2eid.absent()) look_up(options, experts, gating.expert_idx);
  Routing routing;
  route(context,
        {.experts = experts,
         .topk = 1,
         .score = options.norm_type == 1 ? Score::sigmoid : Score::softmax,
         .renormalise = false,
         .nan = NanPolicy::propagate},
        converted(x, DType::f32), routing);
  const float* const scores = routing.scores.as<float>();
  for_ranges(context.pool(), tokens, kGrain, [&](std::int64_t begin, std::int64_t end) {
    Choice choice(options, experts, k);
    for (std::int64_t n = begin; n < end; ++n) {
      if (options.tid2eid.absent()) choice.token(scores + n * experts, ids + n * k);
      weigh(options, scores + n * experts, ids + n * k, n, gating.y);
    }
  });
  if (options.out_flag) {
    gating.out = Array(DType::f32, {tokens, experts});
    std::copy_n(scores, tokens * experts, gating.out.as<float>());
  }
  return gating;
}

}  // namespace expar::ascend
