// The loops for any processor: what the compiler makes of them.
#include <cstring>

#include "bench/loops.h"

namespace expar::bench {
namespace {

std::uint64_t read(const std::byte* data, std::size_t bytes) {
  std::uint64_t sums[8] = {};
  std::size_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    std::uint64_t words[8];
    std::memcpy(words, data + i, sizeof words);
    for (int j = 0; j < 8; ++j) sums[j] += words[j];
  }
  std::uint64_t sum = 0;
  for (; i < bytes; ++i) sum += static_cast<std::uint64_t>(data[i]);
  for (const std::uint64_t s : sums) sum += s;
  return sum;
}

double flops_f32(std::int64_t rounds, float* sink) {
  constexpr int kLanes = 48;
  float sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = sink[i % 16];
  const float factor = 0.999F;
  const float term = 0.001F;
  for (std::int64_t r = 0; r < rounds; ++r) {
    for (float& sum : sums) sum = sum * factor + term;
  }
  for (int i = 0; i < kLanes; ++i) sink[i % 16] = sums[i];
  return static_cast<double>(rounds) * kLanes * 2;
}

}  // namespace

Loops portable_loops() { return {.read = read, .flops_f32 = flops_f32, .flops_bf16 = flops_f32}; }

}  // namespace expar::bench
