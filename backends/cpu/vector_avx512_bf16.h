// Steps in bf16 by the processor's own dot product.
#pragma once

#include "backends/cpu/vector_avx512.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

struct Bf16 {
  static constexpr std::int64_t kPerWord = 2;
  static constexpr int kVectorsAtOnce = 4;
  using Left = __m512bh;
  using Right = __m512bh;
  static Left left(Word w) { return reinterpret_cast<Left>(_mm512_set1_epi32(static_cast<int>(w))); }
  static Right right(const Word* from) { return reinterpret_cast<Right>(_mm512_loadu_si512(from)); }
  static Vector step(Vector sum, Left a, Right b) { return _mm512_dpbf16_ps(sum, a, b); }
};

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
