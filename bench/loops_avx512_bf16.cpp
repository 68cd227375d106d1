// The loop for x86 with bf16 dot products.
#include <immintrin.h>

#include "bench/loops.h"

namespace expar::bench {
namespace {

/// Sixteen chains, as many as the loop of f32 has.
double flops_bf16(std::int64_t rounds, float* sink) {
  __m512 sums[16];
  for (__m512& sum : sums) sum = _mm512_loadu_ps(sink);
  const auto ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  const auto small = (__m512bh)_mm512_set1_epi16(0x3a00);
  for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], ones, small);
  }
  for (int i = 1; i < 16; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  _mm512_storeu_ps(sink, sums[0]);
  return static_cast<double>(rounds) * 16 * 32 * 2;
}

}  // namespace

Loops avx512_bf16_loops() { return {.read = nullptr, .flops_f32 = nullptr, .flops_bf16 = flops_bf16}; }

}  // namespace expar::bench
