// Tokens and routes that every rank can work out for every other, so that each checks what it got by itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <expar/random.h>

namespace expar::test {

/// Unlike a gtest expectation it also ends the rank's function, and works in a child process.
inline void require(bool condition, std::string_view what) {
  if (!condition) throw std::runtime_error(std::string(what));
}

template <class A, class B>
void require_equal(const A& got, const B& wanted, std::string_view what) {
  if (got == wanted) return;
  throw std::runtime_error(std::string(what) + ": got " + std::to_string(got) + ", not " + std::to_string(wanted));
}

enum class Pattern { uniform, one_hot, sparse, repeated };

/// A workload of P ranks.
struct Workload {
  std::string name;
  int ranks = 1;
  std::int64_t experts = 8, topk = 2, hidden = 16;
  Pattern pattern = Pattern::uniform;
  std::vector<std::int64_t> tokens;              // [P]
  std::vector<std::int64_t> first_experts = {};  // as PlanOptions::first_experts

  /// [T, K] of `rank`.
  std::vector<std::int32_t> ids(int rank) const {
    const Random random(7, name + std::to_string(rank));
    std::vector<std::int32_t> ids;
    for (std::int64_t i = 0; i < tokens[static_cast<std::size_t>(rank)] * topk; ++i) {
      const auto draw =
          static_cast<std::int32_t>(random.bits(static_cast<std::uint64_t>(i)) % static_cast<std::uint64_t>(experts));
      switch (pattern) {
        case Pattern::uniform:
          ids.push_back(draw);
          break;
        case Pattern::one_hot:
          ids.push_back(static_cast<std::int32_t>(experts / 2));
          break;
        case Pattern::sparse:
          ids.push_back(random.uniform(static_cast<std::uint64_t>(i) + 1000000) < 0.5F ? -1 : draw);
          break;
        case Pattern::repeated:
          ids.push_back(i % topk == 0 ? draw : ids.back());
          break;
      }
    }
    return ids;
  }
  /// Small whole numbers, different for every token of every rank: sums of them are exact in bf16's products too.
  float x(int rank, std::int64_t token, std::int64_t column) const {
    return static_cast<float>((rank * 31 + token * 7 + column * 3) % 16);
  }
  /// Powers of two.
  float weight(int rank, std::int64_t token, std::int64_t slot) const {
    return 1.0F / static_cast<float>(1 << ((rank + token + slot) % 4));
  }
};

inline std::vector<Workload> workloads(int ranks) {
  const auto p = static_cast<std::size_t>(ranks);
  std::vector<std::int64_t> uneven, idle(p, 9), one(p, 0), first_experts{0};
  for (int r = 1; r < ranks; ++r) first_experts.push_back(std::min(10, r * r + 1));  // 2, 3, 5 and none
  first_experts.push_back(10);
  for (std::size_t r = 0; r < p; ++r) uneven.push_back(static_cast<std::int64_t>((r * 5 + 3) % 11));
  idle.back() = 0;
  one[0] = 1;
  return {
      {"nothing", ranks, 8, 2, 16, Pattern::uniform, std::vector<std::int64_t>(p, 0)},
      {"one token", ranks, 5, 2, 3, Pattern::uniform, one},
      {"uneven", ranks, 64, 8, 33, Pattern::uniform, uneven},
      {"an idle rank", ranks, 8, 2, 16, Pattern::uniform, idle},
      {"one expert", ranks, 1, 1, 5, Pattern::uniform, uneven},
      {"one hot expert", ranks, 8, 2, 64, Pattern::one_hot, uneven},
      {"more ranks than experts", ranks, 3, 2, 16, Pattern::uniform, uneven},
      {"slots not routed", ranks, 5, 8, 7, Pattern::sparse, uneven},
      {"the same expert twice", ranks, 8, 2, 1, Pattern::repeated, uneven},
      {"many tokens", ranks, 64, 8, 130, Pattern::uniform, std::vector<std::int64_t>(p, 70)},
      {"rows of zero bytes", ranks, 8, 2, 0, Pattern::uniform, uneven},
      {"experts placed unevenly", ranks, 10, 3, 16, Pattern::uniform, uneven, first_experts},
  };
}

}  // namespace expar::test
