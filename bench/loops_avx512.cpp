// The loops for x86 with AVX-512.
#include <immintrin.h>

#include "bench/loops.h"

namespace expar::bench {
namespace {

std::uint64_t read(const std::byte* data, std::size_t bytes) {
  __m512i sums[4] = {};
  std::size_t i = 0;
  for (; i + 256 <= bytes; i += 256) {
    for (int j = 0; j < 4; ++j) sums[j] = _mm512_add_epi64(sums[j], _mm512_loadu_si512(data + i + j * 64));
  }
  const __m512i sum = _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3]));
  alignas(64) std::uint64_t words[8];
  _mm512_store_si512(words, sum);
  std::uint64_t total = 0;
  for (const std::uint64_t word : words) total += word;
  for (; i < bytes; ++i) total += static_cast<std::uint64_t>(data[i]);
  return total;
}

/// Sixteen chains: two units, four cycles each, and some to spare.
double flops_f32(std::int64_t rounds, float* sink) {
  __m512 sums[16];
  for (__m512& sum : sums) sum = _mm512_loadu_ps(sink);
  const __m512 factor = _mm512_set1_ps(0.999F);
  const __m512 term = _mm512_set1_ps(0.001F);
  for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_fmadd_ps(sums[i], factor, term);
  }
  for (int i = 1; i < 16; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  _mm512_storeu_ps(sink, sums[0]);
  return static_cast<double>(rounds) * 16 * 16 * 2;
}

}  // namespace

Loops avx512_loops() { return {.read = read, .flops_f32 = flops_f32, .flops_bf16 = flops_f32}; }

}  // namespace expar::bench
