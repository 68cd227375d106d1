// Cuts batches into shards and draws their targets.
#include "models/batch.h"

#include <bit>

namespace expar {

Sharding shard_batch(std::int64_t tokens, std::int64_t shards, int rank, int ranks) {
  Sharding sharding{tokens, shards, 0, {0}};
  const std::int64_t first = rank * shards / ranks;
  const std::int64_t last = (rank + 1) * shards / ranks;
  sharding.first_token = first * tokens / shards;
  for (std::int64_t shard = first; shard < last; ++shard) {
    sharding.offsets.push_back((shard + 1) * tokens / shards - sharding.first_token);
  }
  return sharding;
}

void fill_batch(const Text& text, Batch& batch) {
  batch.targets.clear();
  batch.contexts.clear();
  for (const std::int64_t position : batch.positions) {
    batch.targets.push_back(text[position]);
    const auto context = text.before(position);
    batch.contexts.insert(batch.contexts.end(), context.begin(), context.end());
  }
}

Sampler::Sampler(std::int64_t targets, std::uint64_t seed)
    : targets_(targets),
      random_(seed, "batch"),
      half_bits_((std::bit_width(static_cast<std::uint64_t>(targets - 1)) + 1) / 2) {}

// A Feistel network permutes the numbers of 2 half_bits_ bits; those that are no target are walked over
// (Black & Rogaway 2002), at most four steps on average.
std::int64_t Sampler::target(std::int64_t token) const {
  constexpr std::uint64_t kRounds = 4;
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  const auto pass = static_cast<std::uint64_t>(token / targets_);
  auto value = static_cast<std::uint64_t>(token % targets_);
  do {
    std::uint64_t left = value >> half_bits_;
    std::uint64_t right = value & mask;
    for (std::uint64_t round = 0; round < kRounds; ++round) {
      const std::uint64_t key = ((pass * kRounds + round) << half_bits_) + right;
      const std::uint64_t next = left ^ (random_.bits(key) & mask);
      left = right;
      right = next;
    }
    value = left << half_bits_ | right;
  } while (value >= static_cast<std::uint64_t>(targets_));
  return static_cast<std::int64_t>(value);
}

}  // namespace expar
