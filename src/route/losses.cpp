// The router's losses: means over the global batch, summed shard by shard so that they do not depend on P.
#include <algorithm>
#include <vector>

#include <expar/collectives.h>
#include <expar/operation.h>
#include <expar/router.h>

#include "src/route/check.h"
#include "src/route/loss_terms.h"
#include "src/util/processor.h"

namespace expar {
namespace {

// Columns of a shard's row after its E sums of scores.
enum Column : std::int64_t { kSquares, kTokensHigh, kTokensLow, kColumns };

// Tokens travel as two whole numbers that f32 sums exactly: up to 16,384 ranks and 2^34 tokens.
constexpr std::int64_t kLowTokens = 1024;

using Bounds = std::span<const std::int64_t>;

void check_counts(const std::string& what, std::span<const std::int64_t> counts, std::int64_t experts) {
  if (static_cast<std::int64_t>(counts.size()) == experts) return;
  refuse(what + " has " + std::to_string(counts.size()) + " entries for " + std::to_string(experts) + " experts");
}

void check(const RouterOptions& options, const Routing& routing, std::span<const std::int64_t> counts, Bounds shards,
           const LossInputs& inputs) {
  validate(options);
  require(options, routing);
  check_counts("counts", counts, options.experts);
  if (!inputs.counts_so_far.empty()) check_counts("counts_so_far", inputs.counts_so_far, options.experts);
  if (inputs.tokens_so_far < 0 || (inputs.counts_so_far.empty() && inputs.tokens_so_far > 0)) {
    refuse("tokens_so_far is " + std::to_string(inputs.tokens_so_far) + ", must go with the counts_so_far");
  }
  require_ascending("shards", shards, routing.scores.size(0));
  if (!inputs.sequences.empty()) require_ascending("sequences", inputs.sequences, routing.scores.size(0));
}

/// Sums of scores, columns, and sums of loads where they count.
std::int64_t width_of(const RouterOptions& options) {
  const std::int64_t experts = std::max<std::int64_t>(options.experts, 1);
  return experts + kColumns + (options.load > 0.0F ? experts : 0);
}

/// One row per shard.
Array shard_sums(const RouterOptions& options, const Routing& routing, Bounds shards) {
  const std::int64_t experts = options.experts;
  const auto count = static_cast<std::int64_t>(shards.size()) - 1;
  Array sums(DType::f32, {count, width_of(options)});
  for (std::int64_t s = 0; s < count; ++s) {
    float* row = sums.as<float>() + s * width_of(options);
    for (std::int64_t t = shards[static_cast<std::size_t>(s)]; t < shards[static_cast<std::size_t>(s) + 1]; ++t) {
      const float* scores = routing.loss_scores.as<float>() + t * experts;
      for (std::int64_t e = 0; e < experts; ++e) row[e] += scores[e];
      const float lse = routing.logsumexp.as<float>()[t];
      row[experts + kSquares] += lse * lse;
      if (options.load > 0.0F) add_loads(routing, t, double{options.load_deviation}, row + experts + kColumns);
    }
  }
  if (count > 0) {  // this rank's tokens, once
    sums.as<float>()[experts + kTokensHigh] = static_cast<float>(routing.valid / kLowTokens);
    sums.as<float>()[experts + kTokensLow] = static_cast<float>(routing.valid % kLowTokens);
  }
  return sums;
}

/// Adds up what the losses say of a token's scores: the same for all tokens, for those of a sequence, for one.
class Gradients {
 public:
  explicit Gradients(std::int64_t experts) : common_(static_cast<std::size_t>(experts)) {}

  void add(double coefficient, std::span<const double> by_score) {
    if (coefficient == 0) return;
    any_ = true;
    for (std::size_t e = 0; e < common_.size(); ++e) common_[e] += coefficient * by_score[e];
  }
  void add_sequences(double coefficient, Bounds bounds, std::vector<LossTerm> terms) {
    any_ = true;
    scale_ = coefficient;
    bounds_.assign(bounds.begin(), bounds.end());
    terms_ = std::move(terms);
  }
  void write(const RouterOptions& options, const Routing& routing, std::span<const double> by_load,
             RouterLosses& losses) const {
    if (!any_ && by_load.empty()) return;
    losses.segments = bounds_.empty() ? std::vector<std::int64_t>{0, routing.scores.size(0)} : bounds_;
    for (std::size_t s = 0; s + 1 < losses.segments.size(); ++s) {
      const bool has_term = !terms_.empty() && !terms_[s].gradient.empty();
      for (std::size_t e = 0; e < common_.size(); ++e) {
        losses.dscores.push_back(
            static_cast<float>(has_term ? common_[e] + scale_ * terms_[s].gradient[e] : common_[e]));
      }
    }
    if (!by_load.empty()) write_each(options, routing, by_load, losses);
  }

 private:
  /// Loads are not linear in the scores, so that each token has a row of its own.
  void write_each(const RouterOptions& options, const Routing& routing, std::span<const double> by_load,
                  RouterLosses& losses) const {
    const auto experts = static_cast<std::ptrdiff_t>(common_.size());
    std::vector<std::int64_t> segments{0};
    std::vector<float> dscores;
    for (std::size_t s = 0; s + 1 < losses.segments.size(); ++s) {
      const auto row = losses.dscores.begin() + static_cast<std::ptrdiff_t>(s) * experts;
      for (std::int64_t t = losses.segments[s]; t < losses.segments[s + 1]; ++t) {
        segments.push_back(t + 1);
        dscores.insert(dscores.end(), row, row + experts);
        add_load_gradient(routing, t, double{options.load_deviation}, by_load, dscores.data() + t * experts);
      }
    }
    losses.segments = std::move(segments);
    losses.dscores = std::move(dscores);
  }

  bool any_ = false;
  std::vector<double> common_;  // [E]
  double scale_ = 0;
  std::vector<std::int64_t> bounds_;
  std::vector<LossTerm> terms_;  // of each sequence
};

/// Over all ranks' sequences, in their order.
void add_sequence_balance(const Context& context, const RouterOptions& options, const Routing& routing, Bounds bounds,
                          RouterLosses& losses, Gradients& gradients) {
  std::vector<LossTerm> terms;
  std::vector<float> rows;  // each sequence's loss, and 1 where it has tokens
  for (std::size_t s = 0; s + 1 < bounds.size(); ++s) {
    terms.push_back(sequence_loss(routing, bounds[s], bounds[s + 1]));
    rows.push_back(static_cast<float>(terms.back().value));
    rows.push_back(terms.back().gradient.empty() ? 0.0F : 1.0F);
  }
  float total[2] = {};
  all_reduce(context, ConstTensor(rows.data(), {static_cast<std::int64_t>(terms.size()), 2}), Tensor(total, {2}));
  const double coefficient = double{options.sequence_balance} / std::max(1.0F, total[1]);
  losses.sequence_balance = static_cast<float>(coefficient * total[0]);
  gradients.add_sequences(coefficient, bounds, std::move(terms));
}

}  // namespace

float balance_from_hugging_face(float coefficient, std::int64_t topk) { return coefficient * static_cast<float>(topk); }

RouterLosses router_losses(const Context& context, const RouterOptions& options, const Routing& routing,
                           std::span<const std::int64_t> counts, std::span<const std::int64_t> shards,
                           const LossInputs& inputs) {
  const FloatMode mode;
  Array sums;
  const Context asked = context.attempt([&] {
    check(options, routing, counts, shards, inputs);
    sums = shard_sums(options, routing, shards);
  });
  Array total(DType::f32, {width_of(options)});
  all_reduce(asked, sums, total);
  const std::int64_t experts = options.experts;
  const float* all = total.as<float>();
  const float* rest = all + experts;

  RouterLosses losses;
  losses.load_fraction.resize(static_cast<std::size_t>(experts));
  losses.tokens =
      static_cast<std::int64_t>(rest[kTokensHigh]) * kLowTokens + static_cast<std::int64_t>(rest[kTokensLow]);
  losses.tokens_so_far = losses.tokens + inputs.tokens_so_far;
  losses.counts_so_far.assign(counts.begin(), counts.end());
  for (std::size_t e = 0; e < inputs.counts_so_far.size(); ++e) losses.counts_so_far[e] += inputs.counts_so_far[e];
  if (losses.tokens == 0) return losses;
  const auto tokens = static_cast<double>(losses.tokens);
  const double slots = static_cast<double>(losses.tokens_so_far) * static_cast<double>(options.topk);
  double balance = 0.0;
  std::vector<double> by_balance;
  for (std::size_t e = 0; e < losses.load_fraction.size(); ++e) {
    const double fraction = static_cast<double>(losses.counts_so_far[e]) / slots;
    losses.load_fraction[e] = static_cast<float>(fraction);
    balance += fraction * (all[e] / tokens);
    by_balance.push_back(options.balance * static_cast<double>(experts) * losses.load_fraction[e] / tokens);
  }
  losses.balance = static_cast<float>(options.balance * static_cast<double>(experts) * balance);
  losses.z = static_cast<float>(options.z * (rest[kSquares] / tokens));
  losses.dlogsumexp = static_cast<float>(2.0 * options.z / tokens);

  const std::span<const float> importances(all, static_cast<std::size_t>(experts));
  const LossTerm importance = variance_loss(importances);
  const LossTerm variation = variation_loss(importances);
  losses.importance = static_cast<float>(options.importance * importance.value);
  losses.importance_cv = static_cast<float>(options.importance_cv * variation.value);
  Gradients gradients(experts);
  gradients.add(options.balance > 0.0F ? 1.0 : 0.0, by_balance);
  gradients.add(double{options.importance}, importance.gradient);
  gradients.add(double{options.importance_cv}, variation.gradient);
  if (options.sequence_balance > 0.0F) {
    const Bounds sequences = inputs.sequences.empty() ? shards : inputs.sequences;
    add_sequence_balance(context, options, routing, sequences, losses, gradients);
  }
  LossTerm load;
  if (options.load > 0.0F) {
    load = variation_loss({rest + kColumns, importances.size()});
    losses.load = static_cast<float>(options.load * load.value);
    for (double& by_load : load.gradient) by_load *= double{options.load};
  }
  gradients.write(options, routing, load.gradient, losses);
  return losses;
}

}  // namespace expar
