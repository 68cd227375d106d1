// Sixteen f32 lanes as an array: what the compiler makes of it.
#pragma once

#include "backends/cpu/word.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

struct Vector {
  float lane[16];
};

inline Vector zero() { return {}; }
inline Vector load(const float* from) {
  Vector v;
  for (int i = 0; i < 16; ++i) v.lane[i] = from[i];
  return v;
}
inline void store(float* to, const Vector& v) {
  for (int i = 0; i < 16; ++i) to[i] = v.lane[i];
}

struct F32 {
  static constexpr std::int64_t kPerWord = 1;
  static constexpr int kVectorsAtOnce = 1;
  using Left = float;
  using Right = Vector;
  static Left left(Word w) { return __builtin_bit_cast(float, w); }
  static Right right(const Word* from) {
    Right b;
    for (int i = 0; i < 16; ++i) b.lane[i] = left(from[i]);
    return b;
  }
  static Vector step(const Vector& sum, Left a, const Right& b) {
    Vector next;
    for (int i = 0; i < 16; ++i) next.lane[i] = __builtin_fmaf(a, b.lane[i], sum.lane[i]);
    return next;
  }
};

struct Bf16 {
  static constexpr std::int64_t kPerWord = 2;
  static constexpr int kVectorsAtOnce = 1;
  struct Left {
    float odd, even;
  };
  struct Right {
    Vector odd, even;
  };
  static Left left(Word w) { return {F32::left(w & 0xffff0000u), F32::left(w << 16)}; }
  static Right right(const Word* from) {
    Right b;
    for (int i = 0; i < 16; ++i) {
      b.odd.lane[i] = left(from[i]).odd;
      b.even.lane[i] = left(from[i]).even;
    }
    return b;
  }
  static Vector step(const Vector& sum, const Left& a, const Right& b) {
    return F32::step(F32::step(sum, a.odd, b.odd), a.even, b.even);
  }
};

/// to[s * stride + r] = word s of rows[r], for sixteen rows and sixteen words.
inline void transpose(const std::byte* const* rows, Word* to, std::int64_t stride) {
  for (int s = 0; s < 16; ++s) {
    for (int r = 0; r < 16; ++r) to[s * stride + r] = load_word(rows[r] + 4 * s);
  }
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
