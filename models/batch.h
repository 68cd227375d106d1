// Which tokens a step trains on, and which rank holds them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <expar/random.h>

#include "models/text.h"

namespace expar {

/// A global batch of `tokens` cut into `shards` runs: shard s is tokens floor(s B / S) ... floor((s + 1) B / S) - 1,
/// and rank r holds shards floor(r S / P) ... floor((r + 1) S / P) - 1, perhaps none. What is summed over a batch is
/// summed by shard, so that it does not depend on P.
struct Sharding {
  std::int64_t tokens = 0;            // B
  std::int64_t shards = 0;            // S
  std::int64_t first_token = 0;       // this rank's tokens are [first_token, first_token + offsets.back())
  std::vector<std::int64_t> offsets;  // [S_r + 1] this rank's shards, from 0

  std::int64_t local_tokens() const { return offsets.back(); }
  std::int64_t local_shards() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
};
Sharding shard_batch(std::int64_t tokens, std::int64_t shards, int rank, int ranks);

/// A global batch, the same on every rank.
struct Batch {
  std::vector<std::int64_t> positions;  // [B] of the targets
  std::vector<std::uint8_t> targets;    // [B]
  std::vector<std::uint8_t> contexts;   // [B, C]
};

/// The targets at `positions` with their contexts.
void fill_batch(const Text& text, Batch& batch);

/// Draws training targets in an order that depends on the seed alone: every target once before any comes again, each
/// pass in another order.
class Sampler {
 public:
  Sampler(std::int64_t targets, std::uint64_t seed);
  /// The target (an index below `targets`) of token `token` of a training that has drawn `token` before it.
  std::int64_t target(std::int64_t token) const;

 private:
  std::int64_t targets_;
  Random random_;
  int half_bits_;  // the permutation works on numbers of twice so many bits
};

}  // namespace expar
