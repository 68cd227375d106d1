// What the operators of a domain must give, by plain loops over all ranks' tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <expar/ascend.h>
#include <expar/random.h>

#include "src/util/check.h"

namespace expar::test {

/// All ranks' tokens and choices, the same wherever they are made.
struct Batch {
  std::int64_t ranks, shared_ranks, shared, experts, topk, h = 1024;
  std::vector<std::int64_t> tokens = {}, active = {};  // of each rank
  std::uint64_t seed = 1;
  std::vector<std::vector<std::int32_t>> chosen = {};  // ids of each rank instead of drawn ones
  std::int64_t special = 0;                            // experts without a rank, behind the others
  bool global_bs = true;                               // 0 if not, where all ranks have as many tokens
  bool slot_masks = false;                             // slots are masked one by one instead of tokens

  std::int64_t most() const {
    std::int64_t most = 0;
    for (const std::int64_t count : tokens) most = std::max(most, count);
    return most;
  }
  ascend::Domain domain(int rank) const {
    ascend::Domain domain;
    domain.ep_world_size = ranks;
    domain.ep_rank_id = rank;
    domain.moe_expert_num = experts;
    domain.shared_expert_num = shared;
    domain.shared_expert_rank_num = shared_ranks;
    if (global_bs) domain.global_bs = ranks * most();
    return domain;
  }
  std::string str() const {
    return "W " + std::to_string(ranks) + " SR " + std::to_string(shared_ranks) + " SN " + std::to_string(shared) +
           " E " + std::to_string(experts) + " K " + std::to_string(topk) + " seed " + std::to_string(seed);
  }
  /// Whether a slot counts, and whether its token visits the shared experts.
  bool counts(int rank, std::int64_t token, std::int64_t k) const {
    if (!slot_masks) return token < active[static_cast<std::size_t>(rank)];
    return Random(seed, "mask of " + std::to_string(rank)).uniform(static_cast<std::uint64_t>(token * topk + k)) < 0.6F;
  }
  bool visits(int rank, std::int64_t token) const {
    for (std::int64_t k = 0; k < topk; ++k) {
      if (counts(rank, token, k)) return true;
    }
    return false;
  }
  /// [BS, K], different ones in a row.
  std::vector<std::int32_t> ids(int rank) const {
    if (!chosen.empty()) return chosen[static_cast<std::size_t>(rank)];
    const Random random(seed, "ids of " + std::to_string(rank));
    std::vector<std::int32_t> ids;
    for (std::int64_t t = 0; t < tokens[static_cast<std::size_t>(rank)]; ++t) {
      std::vector<std::int32_t> left(static_cast<std::size_t>(experts + special));
      for (std::size_t e = 0; e < left.size(); ++e) left[e] = static_cast<std::int32_t>(e);
      for (std::int64_t k = 0; k < topk; ++k) {
        const std::size_t pick = static_cast<std::size_t>(random.uniform(static_cast<std::uint64_t>(t * topk + k)) *
                                                          static_cast<double>(left.size()));
        ids.push_back(left[pick]);
        left.erase(left.begin() + static_cast<std::ptrdiff_t>(pick));
      }
    }
    return ids;
  }
  std::vector<float> x(int rank, std::int64_t token) const {
    const Random random(seed, "x of " + std::to_string(rank));
    std::vector<float> row;
    for (std::int64_t i = 0; i < h; ++i) row.push_back(random.normal(static_cast<std::uint64_t>(token * h + i)));
    return row;
  }
  float weight(int rank, std::int64_t token, std::int64_t k) const {
    return Random(seed, "weights of " + std::to_string(rank)).normal(static_cast<std::uint64_t>(token * topk + k));
  }
};

inline Batch even_batch(std::int64_t ranks, std::int64_t shared_ranks, std::int64_t shared, std::int64_t experts,
                        std::int64_t topk, std::int64_t tokens) {
  Batch batch{ranks, shared_ranks, shared, experts, topk};
  batch.tokens.assign(at(ranks), tokens);
  batch.active = batch.tokens;
  return batch;
}

/// Any that the pages allow, with ragged batches of `most` tokens at the most, some of them inactive.
inline Batch random_batch(int ranks, std::uint64_t seed, std::int64_t most = 6) {
  const Random random(seed, "batch");
  std::uint64_t drawn = 0;
  const auto pick = [&](std::int64_t first, std::int64_t last) {
    return first + static_cast<std::int64_t>(random.uniform(drawn++) * static_cast<double>(last - first + 1));
  };
  Batch batch{ranks, 0, pick(0, 4), 0, 0};
  if (batch.shared > 0) batch.shared_ranks = batch.shared * pick(0, ranks / 2 / batch.shared);
  const std::int64_t holders = ranks - batch.shared_ranks;
  batch.experts = holders * pick(1, std::min<std::int64_t>(5, 512 / holders));
  batch.topk = pick(1, std::min<std::int64_t>(batch.experts, 8));
  batch.h = 1024 + 8 * pick(0, 3);
  batch.seed = seed;
  for (int rank = 0; rank < ranks; ++rank) {
    batch.tokens.push_back(pick(1, most));
    batch.active.push_back(pick(0, batch.tokens.back()));
  }
  return batch;
}

/// Throws unless `got` is within `bound` of `wanted`. `what` is only called where it is not.
template <class What>
void require_near(double got, double wanted, double bound, const What& what) {
  if (std::fabs(got - wanted) <= bound) return;
  throw std::runtime_error(what() + " is " + std::to_string(got) + ", not " + std::to_string(wanted) + " to within " +
                           std::to_string(bound));
}

/// A copy of a token: for its slot k, or, from K on, for shared expert k - K.
struct Copy {
  int source;
  std::int64_t token, k;
  friend bool operator==(const Copy&, const Copy&) = default;
};

/// The copies that each local expert of `rank` gets, in order.
inline std::vector<std::vector<Copy>> copies_for(const Batch& batch, int rank) {
  std::vector<std::vector<Copy>> copies;
  const bool is_shared = rank < batch.shared_ranks;
  const std::int64_t local = is_shared ? 1 : batch.experts / (batch.ranks - batch.shared_ranks);
  for (std::int64_t e = 0; e < local; ++e) {
    std::vector<Copy>& of_expert = copies.emplace_back();
    for (int source = 0; source < batch.ranks; ++source) {
      const std::vector<std::int32_t> ids = batch.ids(source);
      for (std::int64_t t = 0; t < batch.tokens[static_cast<std::size_t>(source)]; ++t) {
        if (is_shared) {
          const std::int64_t group = batch.shared_ranks / batch.shared;
          if (batch.visits(source, t) && source % group == rank % group)
            of_expert.push_back({source, t, batch.topk + rank / group});
          continue;
        }
        for (std::int64_t k = 0; k < batch.topk; ++k) {
          if (batch.counts(source, t, k) &&
              ids[static_cast<std::size_t>(t * batch.topk + k)] == (rank - batch.shared_ranks) * local + e)
            of_expert.push_back({source, t, k});
        }
      }
    }
  }
  return copies;
}

}  // namespace expar::test
