// Sixteen f32 lanes in two registers of AVX2.
#pragma once

#include <immintrin.h>

#include "backends/cpu/word.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

struct Vector {
  __m256 low, high;
};

inline Vector zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vector load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Vector v) {
  _mm256_storeu_ps(to, v.low);
  _mm256_storeu_ps(to + 8, v.high);
}

inline __m256i load_words(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

struct F32 {
  static constexpr std::int64_t kPerWord = 1;
  // Six rows of sums take twelve of the sixteen registers.
  static constexpr int kVectorsAtOnce = 1;
  using Left = __m256;
  using Right = Vector;
  static Left left(Word w) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(w))); }
  static Right right(const Word* from) {
    return {_mm256_castsi256_ps(load_words(from)), _mm256_castsi256_ps(load_words(from + 8))};
  }
  static Vector step(Vector sum, Left a, const Right& b) {
    return {_mm256_fmadd_ps(a, b.low, sum.low), _mm256_fmadd_ps(a, b.high, sum.high)};
  }
};

struct Bf16 {
  static constexpr std::int64_t kPerWord = 2;
  static constexpr int kVectorsAtOnce = 1;
  struct Left {
    __m256 odd, even;
  };
  struct Right {
    Vector odd, even;
  };
  static __m256 odd_of(__m256i words) {
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static __m256 even_of(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }

  static Left left(Word w) {
    const __m256i words = _mm256_set1_epi32(static_cast<int>(w));
    return {odd_of(words), even_of(words)};
  }
  static Right right(const Word* from) {
    const __m256i low = load_words(from), high = load_words(from + 8);
    return {{odd_of(low), odd_of(high)}, {even_of(low), even_of(high)}};
  }
  static Vector step(Vector sum, const Left& a, const Right& b) {
    return F32::step(F32::step(sum, a.odd, b.odd), a.even, b.even);
  }
};

inline void transpose8(const std::byte* const* rows, std::int64_t offset, Word* to, std::int64_t stride) {
  __m256i a[8], b[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) a[r] = load_words(rows[r] + offset);
#pragma GCC unroll 8
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {
    a[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j * stride), _mm256_permute2x128_si256(a[j], a[4 + j], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (4 + j) * stride),
                        _mm256_permute2x128_si256(a[j], a[4 + j], 0x31));
  }
}

/// to[s * stride + r] = word s of rows[r], for sixteen rows and sixteen words.
inline void transpose(const std::byte* const* rows, Word* to, std::int64_t stride) {
  transpose8(rows, 0, to, stride);
  transpose8(rows, 32, to + 8 * stride, stride);
  transpose8(rows + 8, 0, to + 8, stride);
  transpose8(rows + 8, 32, to + 8 * stride + 8, stride);
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
