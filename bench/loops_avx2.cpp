// The loops for x86 with AVX2 and FMA.
#include <immintrin.h>

#include "bench/loops.h"

namespace expar::bench {
namespace {

std::uint64_t read(const std::byte* data, std::size_t bytes) {
  __m256i sums[4] = {};
  std::size_t i = 0;
  for (; i + 128 <= bytes; i += 128) {
    const auto* at = reinterpret_cast<const __m256i*>(data + i);
    for (int j = 0; j < 4; ++j) sums[j] = _mm256_add_epi64(sums[j], _mm256_loadu_si256(at + j));
  }
  const __m256i sum = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
  alignas(32) std::uint64_t words[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), sum);
  for (; i < bytes; ++i) words[0] += static_cast<std::uint64_t>(data[i]);
  return words[0] + words[1] + words[2] + words[3];
}

/// Twelve chains: two units, four cycles each, and some to spare.
double flops_f32(std::int64_t rounds, float* sink) {
  __m256 sums[12];
  for (__m256& sum : sums) sum = _mm256_loadu_ps(sink);
  const __m256 factor = _mm256_set1_ps(0.999F);
  const __m256 term = _mm256_set1_ps(0.001F);
  for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = _mm256_fmadd_ps(sums[i], factor, term);
  }
  for (int i = 1; i < 12; ++i) sums[0] = _mm256_add_ps(sums[0], sums[i]);
  _mm256_storeu_ps(sink, sums[0]);
  return static_cast<double>(rounds) * 12 * 8 * 2;
}

}  // namespace

Loops avx2_loops() { return {.read = read, .flops_f32 = flops_f32, .flops_bf16 = flops_f32}; }

}  // namespace expar::bench
