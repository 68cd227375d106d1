// Steps in bf16 by two fused multiply-adds, for processors with AVX-512 but no dot product of their own: odd first,
// then even, which is what vdpbf16ps does.
#pragma once

#include "backends/cpu/vector_avx512.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

struct Bf16 {
  static constexpr std::int64_t kPerWord = 2;
  // Two halves of each right-hand register: two vectors by six rows of sums take 18 of the 32, four would spill.
  static constexpr int kVectorsAtOnce = 2;
  struct Left {
    __m512 odd, even;
  };
  using Right = Left;
  static Left halves(__m512i words) {
    return {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))),
            _mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
  }
  static Left left(Word w) { return halves(_mm512_set1_epi32(static_cast<int>(w))); }
  static Right right(const Word* from) { return halves(_mm512_loadu_si512(from)); }
  static Vector step(Vector sum, const Left& a, const Right& b) {
    return F32::step(F32::step(sum, a.odd, b.odd), a.even, b.even);
  }
};

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
