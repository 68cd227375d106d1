// Scores, choice and weights of one token.
#include "src/route/token.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "src/route/check.h"
#include "src/route/layout.h"
#include "src/util/top_k.h"

namespace expar {
namespace {

double score_of(Score score, double z) {
  if (score == Score::sigmoid) return 1.0 / (1.0 + std::exp(-z));
  return std::sqrt(std::max(z, 0.0) + std::log1p(std::exp(-std::abs(z))));
}

}  // namespace

void TokenForward::token(std::int64_t t, const Scratch& scratch) const {
  if (is_padding(inputs.mask, t)) return leave_out(t);
  if (options.score == Score::softmax) {
    score_by_softmax(t, scratch.scores);
  } else {
    score_each(t, scratch.scores);
  }
  if (chooses || compares_others(options)) compare(t, scratch);
  if (chooses) choose(t, scratch);
  for (std::int64_t k = 0; k < slots; ++k) {
    const std::int32_t id = ids(t)[k];
    scratch.best[k] = id < 0 ? 0.0 : scratch.scores[id];
    row(routing.top, t)[k] = static_cast<float>(scratch.best[k]);
  }
  weigh(t, scratch.best);
}

void TokenForward::token_of_kernel(std::int64_t t) const {
  is_padding(inputs.mask, t) ? leave_out(t) : weigh(t, row(routing.top, t));
}

void TokenForward::leave_out(std::int64_t t) const {
  std::fill_n(ids(t), slots, -1);
  std::fill_n(row(routing.weights, t), slots, 0.0F);
  std::fill_n(row(routing.top, t), slots, 0.0F);
  for (const Tensor* tensor : {&routing.scores, &routing.choice_scores, &routing.loss_scores, &routing.probabilities}) {
    std::fill_n(row(*tensor, t), options.experts, 0.0F);
  }
  routing.logsumexp.as<float>()[t] = 0.0F;
}

void TokenForward::score_by_softmax(std::int64_t t, double* scores) const {
  float* stored = row(routing.scores, t);
  if (!options.double_scores) {  // the kernel has been here
    std::copy_n(stored, options.experts, scores);
    return;
  }
  const float* z = logits + t * options.experts;
  float largest = z[0];
  for (std::int64_t e = 1; e < options.experts; ++e) largest = std::fmax(largest, z[e]);
  double sum = 0;
  for (std::int64_t e = 0; e < options.experts; ++e) sum += scores[e] = std::exp(double{z[e]} - double{largest});
  for (std::int64_t e = 0; e < options.experts; ++e) stored[e] = static_cast<float>(scores[e] /= sum);
  routing.logsumexp.as<float>()[t] = static_cast<float>(double{largest} + std::log(sum));
}

void TokenForward::score_each(std::int64_t t, double* scores) const {
  const float* z = logits + t * options.experts;
  double sum = 0;
  for (std::int64_t e = 0; e < options.experts; ++e) {
    scores[e] = rounded(score_of(options.score, double{z[e]}));
    row(routing.scores, t)[e] = static_cast<float>(scores[e]);
    sum = rounded(sum + scores[e]);
  }
  sum = rounded(sum + double{kTiny});
  for (std::int64_t e = 0; e < options.experts; ++e) {
    row(routing.loss_scores, t)[e] = static_cast<float>(scores[e] / sum);
  }
}

double TokenForward::worth_of_group(std::int64_t group, const Scratch& scratch) const {
  const std::int64_t size = options.experts / options.groups;
  std::int32_t ids[2];
  double best[2] = {};
  TopK top(options.selection_bias ? std::min<std::int64_t>(2, size) : 1, ids, best);
  for (std::int64_t e = group * size; e < (group + 1) * size; ++e) {
    top.offer(static_cast<std::int32_t>(e), scratch.values[e]);
  }
  return rounded(best[0] + best[1]);
}

/// The experts of the token's groups, in ascending order.
template <class Use>
void TokenForward::for_candidates(const Scratch& scratch, Use use) const {
  const bool all = options.groups_used == options.groups;
  const std::int64_t size = all ? options.experts : options.experts / options.groups;
  for (std::int64_t i = 0; i < (all ? 1 : options.groups_used); ++i) {
    const std::int64_t first = all ? 0 : scratch.used_groups[i] * size;
    for (std::int64_t e = first; e < first + size; ++e) use(e);
  }
}

/// What is compared, and the groups in which.
void TokenForward::compare(std::int64_t t, const Scratch& scratch) const {
  const float* z = logits + t * options.experts;
  const float* bias = options.selection_bias ? inputs.selection_bias.as<float>() : nullptr;
  const bool by_logits = options.choice == Choice::logits || options.choice == Choice::sinkhorn;
  for (std::int64_t e = 0; e < options.experts; ++e) {
    double& value = scratch.values[e] = by_logits ? double{z[e]} : scratch.scores[e];
    if (!logit_bias.empty()) value += logit_bias[static_cast<std::size_t>(e)];
    if (bias != nullptr) value = rounded(value + double{bias[e]});
  }
  if (options.groups_used < options.groups) {
    TopK best_groups(options.groups_used, scratch.used_groups, scratch.groups);
    for (std::int64_t g = 0; g < options.groups; ++g) {
      best_groups.offer(static_cast<std::int32_t>(g), worth_of_group(g, scratch));
    }
    std::sort(scratch.used_groups, scratch.used_groups + options.groups_used);  // so that ties go to the lower expert
  }
  if (!compares_others(options)) return;
  float* kept = row(routing.choice_scores, t);
  std::fill_n(kept, options.experts, -std::numeric_limits<float>::infinity());
  for_candidates(scratch, [&](std::int64_t e) { kept[e] = static_cast<float>(scratch.values[e]); });
}

void TokenForward::choose(std::int64_t t, const Scratch& scratch) const {
  TopK top(options.topk, ids(t), scratch.best);
  for_candidates(scratch, [&](std::int64_t e) { top.offer(static_cast<std::int32_t>(e), scratch.values[e]); });
}

template <class Number>
void TokenForward::weigh(std::int64_t t, const Number* top) const {
  double sum = 1.0;
  if (options.renormalise) {
    sum = 0.0;
    for (std::int64_t k = 0; k < slots; ++k) sum = rounded(sum + double{top[k]});
    sum = rounded(sum + double{kTiny});
  }
  for (std::int64_t k = 0; k < slots; ++k) {
    row(routing.weights, t)[k] = static_cast<float>(rounded(double{top[k]} / sum) * double{options.scaling});
  }
}

}  // namespace expar
