// Choices that need the whole batch: Sinkhorn's, and experts that choose their tokens.
#include "src/route/global_choice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "src/route/check.h"
#include "src/util/check.h"
#include "src/util/ranges.h"
#include "src/util/shown.h"
#include "src/util/top_k.h"

namespace expar {
namespace {

/// Calls use(row, token) for each of this rank's tokens that is no padding.
template <class Use>
void for_valid(const Routing& routing, std::int64_t tokens, Use use) {
  std::int64_t row = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    if (!is_padding(routing.mask, t)) use(row++, t);
  }
}

/// A token that an expert may take.
struct Candidate {
  float score = 0;
  std::int64_t token = 0;
  bool operator<(const Candidate& other) const {
    return score != other.score ? score > other.score : token < other.token;
  }
};

/// The worst of the `take` tokens that an expert takes, of which there is at least one.
Candidate last_taken(const ConstTensor& scores, std::int64_t expert, std::int64_t take) {
  const std::int64_t experts = scores.size(1);
  std::vector<Candidate> candidates(at(scores.size(0)));
  for (std::int64_t t = 0; t < scores.size(0); ++t) {
    const float score = scores.as<float>()[t * experts + expert];
    // What is no number comes last, so that there is an order.
    candidates[at(t)] = {std::isnan(score) ? -std::numeric_limits<float>::infinity() : score, t};
  }
  const auto last = candidates.begin() + take - 1;
  std::nth_element(candidates.begin(), last, candidates.end());
  return *last;
}

}  // namespace

BatchRows gather_rows(const Context& context, const RouterOptions& options, Routing& routing,
                      FunctionRef<ConstTensor()> prepare) {
  const Communicator& communicator = context.communicator();
  Signature signature("route");
  signature.with("choice", static_cast<std::int64_t>(options.choice)).with("experts", options.experts);
  signature.with("topk", options.topk).with("score", static_cast<std::int64_t>(options.score));
  const std::size_t row_bytes = at(options.experts) * sizeof(float);
  BatchRows batch;
  share(
      communicator, signature,
      [&](const Operation& operation, Block& block) {
        const ConstTensor rows = prepare();
        block = communicator.allocate(at(routing.valid) * row_bytes);
        for_valid(routing, rows.size(0), [&](std::int64_t row, std::int64_t token) {
          std::memcpy(block.data() + at(row) * row_bytes, rows.rows(token, 1).data(), row_bytes);
        });
        return operation.show(block);
      },
      [&](const Operation&, const Reading& reading) {
        std::size_t tokens = 0;
        for (int rank = 0; rank < context.size(); ++rank) {
          if (rank == context.rank()) batch.first = static_cast<std::int64_t>(tokens);
          tokens += reading.from(rank).size() / row_bytes;
        }
        const Tensor all = routing.scratch.view(DType::f32, {static_cast<std::int64_t>(tokens), options.experts});
        std::byte* to = all.bytes();
        for (int rank = 0; rank < context.size(); ++rank) {
          const auto rows = reading.from(rank).first(reading.from(rank).size() / row_bytes * row_bytes);
          to = std::copy(rows.begin(), rows.end(), to);
        }
        batch.all = all;
      });
  return batch;
}

std::vector<double> sinkhorn_bias(const Context& context, const ConstTensor& logits) {
  // As Megatron stops and keeps clear of zero.
  constexpr double kClear = 1e-8;
  constexpr double kEnough = 1e-4;
  constexpr int kMostRounds = 1000;
  const FloatMode mode;
  const std::int64_t tokens = logits.size(0), experts = logits.size(1);
  const std::int64_t pieces = (tokens + kGrain - 1) / kGrain;
  std::vector<double> costs(at(tokens * experts)), factors(at(experts), 1.0), sums(at(pieces * experts));
  for_ranges(context.pool(), tokens, kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const float* z = logits.as<float>() + t * experts;
      // A factor of a row changes nothing, so none overflows.
      const double largest = *std::max_element(z, z + experts);
      for (std::int64_t e = 0; e < experts; ++e) costs[at(t * experts + e)] = std::exp(double{z[e]} - largest);
    }
  });
  for (int round = 0; round < kMostRounds; ++round) {
    for_ranges(context.pool(), tokens, kGrain, [&](std::int64_t begin, std::int64_t end) {
      double* of_piece = sums.data() + begin / kGrain * experts;
      std::fill_n(of_piece, experts, 0.0);
      for (std::int64_t t = begin; t < end; ++t) {
        const double* cost = costs.data() + t * experts;
        double sum = 0;
        for (std::int64_t e = 0; e < experts; ++e) sum += factors[at(e)] * cost[e];
        if (!std::isfinite(sum)) continue;  // a token with a NaN has no say
        const double of_token = 1.0 / static_cast<double>(tokens) / (sum + kClear);
        for (std::int64_t e = 0; e < experts; ++e) of_piece[e] += of_token * cost[e];
      }
    });
    double change = 0;
    for (std::int64_t e = 0; e < experts; ++e) {
      double sum = 0;
      for (std::int64_t piece = 0; piece < pieces; ++piece) sum += sums[at(piece * experts + e)];
      const double next = 1.0 / static_cast<double>(experts) / (sum + kClear);
      change += std::abs(next - factors[at(e)]) / static_cast<double>(experts);
      factors[at(e)] = next;
    }
    if (change <= kEnough) break;
  }
  for (double& factor : factors) factor = std::log(factor);
  return factors;
}

void let_experts_choose(const Context& context, const RouterOptions& options, const BatchRows& scores,
                        const Routing& routing) {
  const std::int64_t tokens = scores.all.size(0), experts = options.experts;
  if (tokens == 0) return;
  const std::int64_t take = (tokens * options.topk + experts - 1) / experts;
  std::vector<Candidate> last(at(experts));
  for_ranges(context.pool(), experts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = begin; e < end; ++e) last[at(e)] = last_taken(scores.all, e, take);
  });
  std::vector<double> scratch(at(experts));
  for_valid(routing, routing.ids.size(0), [&](std::int64_t row, std::int64_t t) {
    TopK best(experts, routing.ids.as<std::int32_t>() + t * experts, scratch.data());
    const float* score = scores.all.as<float>() + (scores.first + row) * experts;
    for (std::int64_t e = 0; e < experts; ++e) {
      const Candidate candidate{std::isnan(score[e]) ? -std::numeric_limits<float>::infinity() : score[e],
                                scores.first + row};
      if (!(last[at(e)] < candidate)) best.offer(static_cast<std::int32_t>(e), double{score[e]});
    }
  });
}

}  // namespace expar
