// Sixteen f32 lanes in one register of AVX-512: all but the steps in bf16.
#pragma once

#include <immintrin.h>

#include "backends/cpu/word.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

using Vector = __m512;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }

struct F32 {
  static constexpr std::int64_t kPerWord = 1;
  // Four registers of right-hand columns by six rows of sums, and a broadcast: 29 of the 32.
  static constexpr int kVectorsAtOnce = 4;
  using Left = __m512;
  using Right = __m512;
  static Left left(Word w) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(w))); }
  static Right right(const Word* from) { return _mm512_loadu_ps(from); }
  static Vector step(Vector sum, Left a, Right b) { return _mm512_fmadd_ps(a, b, sum); }
};

/// to[s * stride + r] = word s of rows[r], for sixteen rows and sixteen words.
inline void transpose(const std::byte* const* rows, Word* to, std::int64_t stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(rows[r]);
#pragma GCC unroll 16
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
  // a[4 q + j]: column j of each 128-bit lane, rows 4 q to 4 q + 3.
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {
    a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
    _mm512_storeu_si512(to + j * stride, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(to + (4 + j) * stride, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(to + (8 + j) * stride, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(to + (12 + j) * stride, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
