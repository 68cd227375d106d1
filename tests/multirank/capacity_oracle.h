// Bounding the rows of each expert as plain loops over the global batch: what the library is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include <expar/capacity.h>
#include <expar/random.h>

namespace expar::oracle {

inline std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

/// A batch with what a router gave each token. Scores are few, so that many are equal.
struct Batch {
  std::int64_t tokens = 0, experts = 1, topk = 1;
  std::vector<std::int32_t> ids;            // [T, K]
  std::vector<float> scores, top, weights;  // [T, E], [T, K], [T, K]

  Batch() = default;
  /// `hot`: every token's first choice is expert 0. `sparse`: some slots are not routed.
  Batch(std::int64_t t, std::int64_t e, std::int64_t k, std::uint64_t seed, bool hot = false, bool sparse = false)
      : tokens(t), experts(e), topk(k) {
    const Random random(seed, "batch");
    for (std::int64_t i = 0; i < t * e; ++i) {
      const float skew = 1.0F / static_cast<float>(1 + i % e);
      scores.push_back(std::round(16 * skew * random.uniform(static_cast<std::uint64_t>(i))) / 16);
      if (hot && i % e == 0) scores.back() = 2;
    }
    for (std::int64_t token = 0; token < t; ++token) {
      std::vector<std::int32_t> order(at(e));
      std::iota(order.begin(), order.end(), 0);
      const float* row = scores.data() + token * e;
      std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return row[a] > row[b]; });
      for (std::int64_t slot = 0; slot < k; ++slot) {
        const bool out = sparse && random.bits(static_cast<std::uint64_t>(1000000 + token * k + slot)) % 3 == 0;
        ids.push_back(out ? -1 : order[at(slot)]);
        top.push_back(row[order[at(slot)]]);
        weights.push_back(top.back() + 0.25F);
      }
    }
  }
  /// Tokens [begin, end) alone.
  Batch(const Batch& all, std::int64_t begin, std::int64_t end)
      : tokens(end - begin), experts(all.experts), topk(all.topk) {
    const auto cut = [&](const auto& from, auto& to, std::int64_t width) {
      to.assign(from.begin() + begin * width, from.begin() + end * width);
    };
    cut(all.ids, ids, topk), cut(all.top, top, topk), cut(all.weights, weights, topk);
    cut(all.scores, scores, experts);
  }
};

inline std::int64_t rows_of(const Batch& batch, const CapacityOptions& options) {
  if (options.rows > 0) return options.rows;
  const auto slots = static_cast<double>(batch.tokens * batch.topk);
  return static_cast<std::int64_t>(
      std::min(slots, std::ceil(slots / static_cast<double>(batch.experts) * options.factor)));
}

inline std::vector<std::int32_t> first_stay(const Batch& batch, std::int64_t rows) {
  std::vector<std::int64_t> used(at(batch.experts));
  std::vector<std::int32_t> ids = batch.ids;
  for (std::int32_t& id : ids)
    if (id >= 0 && ++used[at(id)] > rows) id = -1;
  return ids;
}

inline std::vector<std::int32_t> best_stay(const Batch& batch, std::int64_t rows) {
  std::vector<std::int32_t> ids(batch.ids.size(), -1);
  for (std::int32_t e = 0; e < batch.experts; ++e) {
    std::vector<std::size_t> slots;
    for (std::size_t i = 0; i < ids.size(); ++i)
      if (batch.ids[i] == e) slots.push_back(i);
    std::stable_sort(slots.begin(), slots.end(), [&](auto a, auto b) { return batch.top[a] > batch.top[b]; });
    for (std::size_t n = 0; n < slots.size() && n < at(rows); ++n) ids[slots[n]] = e;
  }
  return ids;
}

/// Round by round: all that ask are served by position; then all that were refused look for their next choice.
inline std::vector<std::int32_t> rerouted(const Batch& batch, std::int64_t rows) {
  std::vector<std::int64_t> used(at(batch.experts));
  std::vector<std::int32_t> ids(batch.ids.size(), -1), wish = batch.ids;
  for (bool asked = true; asked;) {
    asked = false;
    std::vector<std::size_t> refused;
    for (std::size_t i = 0; i < wish.size(); ++i) {
      if (wish[i] < 0) continue;
      if (used[at(wish[i])] < rows) {
        ++used[at(ids[i] = wish[i])];
      } else {
        refused.push_back(i);
      }
      wish[i] = -1;
    }
    for (const std::size_t i : refused) {
      const std::int64_t token = static_cast<std::int64_t>(i) / batch.topk;
      for (std::int32_t e = 0; e < batch.experts; ++e) {
        const float* row = batch.scores.data() + token * batch.experts;
        bool free = used[at(e)] < rows && row[e] != -INFINITY;
        for (std::int64_t j = token * batch.topk; j < (token + 1) * batch.topk; ++j)
          free = free && ids[at(j)] != e && wish[at(j)] != e;
        if (free && (wish[i] < 0 || row[e] > row[wish[i]])) wish[i] = e;
      }
      asked = asked || wish[i] >= 0;
    }
  }
  return ids;
}

inline std::vector<std::int32_t> bounded(const Batch& batch, const CapacityOptions& options) {
  const std::int64_t rows = rows_of(batch, options);
  if (options.policy == CapacityPolicy::drop_by_score) return best_stay(batch, rows);
  if (options.policy == CapacityPolicy::reroute) return rerouted(batch, rows);
  return first_stay(batch, rows);
}

}  // namespace expar::oracle
