// The router's losses: means over the global batch, summed shard by shard so that they do not depend on P.
#include <algorithm>
#include <optional>
#include <vector>

#include <expar/collectives.h>
#include <expar/router.h>

#include "src/route/check.h"
#include "src/util/processor.h"

namespace expar {
namespace {

// Columns of a shard's row after its E sums of scores.
enum Column : std::int64_t { kSquares, kTokensHigh, kTokensLow, kRefused, kColumns };

// Tokens travel as two whole numbers that f32 sums exactly: up to 16,384 ranks and 2^34 tokens.
constexpr std::int64_t kLowTokens = 1024;

void check_shards(std::span<const std::int64_t> shards, std::int64_t tokens) {
  if (shards.empty() || shards.front() != 0) refuse("shards must begin with 0");
  for (std::size_t s = 1; s < shards.size(); ++s) {
    if (shards[s] >= shards[s - 1]) continue;
    refuse("shards[" + std::to_string(s) + "] is " + std::to_string(shards[s]) + ", below the " +
           std::to_string(shards[s - 1]) + " before it");
  }
  if (shards.back() != tokens) {
    refuse("shards end at " + std::to_string(shards.back()) + ", this rank has " + std::to_string(tokens) + " tokens");
  }
}

void check(const RouterOptions& options, const Routing& routing, std::span<const std::int64_t> counts,
           std::span<const std::int64_t> shards) {
  validate(options);
  require(options, routing);
  if (static_cast<std::int64_t>(counts.size()) != options.experts) {
    refuse("counts has " + std::to_string(counts.size()) + " entries for " + std::to_string(options.experts) +
           " experts");
  }
  check_shards(shards, routing.scores.size(0));
}

/// One row per shard.
Array shard_sums(const Routing& routing, std::span<const std::int64_t> shards) {
  const std::int64_t experts = routing.scores.size(1);
  const auto count = static_cast<std::int64_t>(shards.size()) - 1;
  Array sums(DType::f32, {count, experts + kColumns});
  for (std::int64_t s = 0; s < count; ++s) {
    float* row = sums.as<float>() + s * (experts + kColumns);
    for (std::int64_t t = shards[static_cast<std::size_t>(s)]; t < shards[static_cast<std::size_t>(s) + 1]; ++t) {
      const float* scores = routing.loss_scores.as<float>() + t * experts;
      for (std::int64_t e = 0; e < experts; ++e) row[e] += scores[e];
      const float lse = routing.logsumexp.as<float>()[t];
      row[experts + kSquares] += lse * lse;
    }
  }
  if (count > 0) {  // this rank's tokens, once
    sums.as<float>()[experts + kTokensHigh] = static_cast<float>(routing.valid / kLowTokens);
    sums.as<float>()[experts + kTokensLow] = static_cast<float>(routing.valid % kLowTokens);
  }
  return sums;
}

void fill_gradients(const RouterOptions& options, std::int64_t local_tokens, RouterLosses& losses) {
  const auto tokens = static_cast<double>(losses.tokens);
  losses.dlogsumexp = static_cast<float>(2.0 * options.z / tokens);
  if (options.balance == 0.0F) return;
  losses.segments = {0, local_tokens};
  for (const float fraction : losses.load_fraction) {
    losses.dscores.push_back(
        static_cast<float>(options.balance * static_cast<double>(options.experts) * fraction / tokens));
  }
}

/// Every rank throws the error of the lowest rank that has one.
[[noreturn]] void throw_together(const Context& context, const std::optional<Error>& failure) {
  Operation operation(context.communicator(), Signature("router_losses"), context.timeout());
  operation.ready([&]() -> Operation::Words {
    if (failure) throw *failure;
    return {};
  });
  operation.meet();
  operation.done();
  operation.complete();
  throw Error(ErrorCode::internal, "a rank refused its arguments and did not say why");
}

}  // namespace

RouterLosses router_losses(const Context& context, const RouterOptions& options, const Routing& routing,
                           std::span<const std::int64_t> counts, std::span<const std::int64_t> shards) {
  const FloatMode mode;
  // A rank whose arguments are wrong says so in a column of its own, which costs the others nothing.
  std::optional<Error> failure;
  const std::int64_t experts = std::max<std::int64_t>(options.experts, 1);
  Array sums;
  try {
    check(options, routing, counts, shards);
    sums = shard_sums(routing, shards);
  } catch (const Error& error) {
    failure = error;
    sums = Array(DType::f32, {1, experts + kColumns});
    sums.as<float>()[experts + kRefused] = 1.0F;
  }
  Array total(DType::f32, {experts + kColumns});
  all_reduce(context, sums, total);
  const float* all = total.as<float>();
  const float* rest = all + experts;
  if (rest[kRefused] > 0.0F) throw_together(context, failure);

  RouterLosses losses;
  losses.load_fraction.resize(static_cast<std::size_t>(experts));
  losses.tokens =
      static_cast<std::int64_t>(rest[kTokensHigh]) * kLowTokens + static_cast<std::int64_t>(rest[kTokensLow]);
  if (losses.tokens == 0) return losses;
  const auto tokens = static_cast<double>(losses.tokens);
  double balance = 0.0;
  for (std::size_t e = 0; e < losses.load_fraction.size(); ++e) {
    const double fraction = static_cast<double>(counts[e]) / (tokens * static_cast<double>(options.topk));
    losses.load_fraction[e] = static_cast<float>(fraction);
    balance += fraction * (all[e] / tokens);
  }
  losses.balance = static_cast<float>(options.balance * static_cast<double>(experts) * balance);
  losses.z = static_cast<float>(options.z * (rest[kSquares] / tokens));
  fill_gradients(options, shards.back(), losses);
  return losses;
}

}  // namespace expar
