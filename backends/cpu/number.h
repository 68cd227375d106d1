// One number at a time: elements in memory, exp, log, the sigmoid, the normal distribution. Loops over these vectorise.
#pragma once

#include "backends/cpu/word.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

inline float as_float(Word bits) { return __builtin_bit_cast(float, bits); }
inline Word as_word(float value) { return __builtin_bit_cast(Word, value); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline float widen(float value) { return value; }
inline float widen(std::uint16_t bits) { return as_float(static_cast<Word>(bits) << 16); }

/// To f32 or, rounded to nearest even, to the bits of a bf16; NaN stays NaN.
template <class E>
E narrow(float value);
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline std::uint16_t narrow<std::uint16_t>(float value) {
  const Word u = as_word(value);
  const Word rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

/// e^x within 2 units in the last place: 2^n times a Taylor series for |r| <= ln 2 / 2, whose term x^8 / 8! is below
/// 2^-27. Under 2^-126 it is zero, as FloatMode demands; NaN stays NaN.
inline float exp(float x) {
  x = x < -104.0F ? -104.0F : x;       // zero from -87.4 on
  x = x > 89.0F ? 89.0F : x;           // infinity from 88.8 on
  constexpr float kRound = 0x1.8p23F;  // adding it leaves the nearest integer in the low bits
  const float shifted = fma(x, 0x1.715476p0F, kRound);
  const float n = shifted - kRound;
  float r = fma(n, -0x1.62e400p-1F, x);  // ln 2 in two parts, the first short enough for an exact product
  r = fma(n, -0x1.7f7d1cp-20F, r);
  float p = 1.0F / 5040;
  p = fma(p, r, 1.0F / 720);
  p = fma(p, r, 1.0F / 120);
  p = fma(p, r, 1.0F / 24);
  p = fma(p, r, 1.0F / 6);
  p = fma(p, r, 0.5F);
  p = fma(p, r, 1.0F);
  p = fma(p, r, 1.0F);
  // 2^n as two factors: n goes from -150 to 128, an exponent field holds -126 to 127.
  const Word whole = as_word(shifted) - as_word(kRound) + 1024;  // positive, so that a shift halves it
  const Word half = whole >> 1, rest = whole - half;
  return p * as_float((half - 512 + 127) << 23) * as_float((rest - 512 + 127) << 23);
}

/// ln x for a normal x, within 2 units: x = 2^e m with m near 1, ln m = 2 artanh((m - 1) / (m + 1)) by its series,
/// whose next term is below 2^-30.
inline float log(float x) {
  const Word u = as_word(x);
  // Shifted so that m lies in [sqrt(1/2), sqrt(2)).
  const Word from_half = u - 0x3f3504f3u;
  const float e = static_cast<float>(static_cast<std::int32_t>(from_half) >> 23);
  const float m = as_float((from_half & 0x7fffffu) + 0x3f3504f3u);
  const float f = (m - 1) / (m + 1), s = f * f;
  float p = 2.0F / 11;
  p = fma(p, s, 2.0F / 9);
  p = fma(p, s, 2.0F / 7);
  p = fma(p, s, 2.0F / 5);
  p = fma(p, s, 2.0F / 3);
  p = fma(p * s, f, 2 * f);
  const float low = fma(e, 0x1.7f7d1cp-20F, p);
  const float sum = fma(e, 0x1.62e400p-1F, low);
  return x < 0x1.fffffep127F ? sum : x;  // infinity and NaN
}

inline float sigmoid(float x) { return 1 / (1 + exp(-x)); }

/// The normal distribution at x: its integral and its density.
struct Normal {
  float integral, density;
};

/// From erfc(a) for a = |x| / sqrt 2 as exp(-a^2) / (1 + 2 a) * g(a / (a + 2)), a form whose g is smooth on the whole
/// half line (after Shepherd & Laframboise 1981) and exact at zero: g = 1 + t q(t), q the polynomial through the values
/// at the nine Chebyshev points of a in [0, 10]. In f32 g is within 1.3 units.
inline Normal normal(float x) {
  const float magnitude = as_float(as_word(x) & 0x7fffffffu) * 0x1.6a09e6p-1F;
  const float a = magnitude > 10.0F ? 10.0F : magnitude;  // exp(-100) is zero in f32
  const float square = a * a;
  const float lost = fma(a, a, -square);  // exp(-a^2) would magnify the rounding of the square
  const float tail = exp(-square) * (1 - lost);
  const float t = a / (a + 2);
  float g = -0x1.a87f16p-3F;
  g = fma(g, t, 0x1.3b32c0p-1F);
  g = fma(g, t, -0x1.b7ae6ep-2F);
  g = fma(g, t, -0x1.3d54eep-4F);
  g = fma(g, t, -0x1.caf3f8p-2F);
  g = fma(g, t, 0x1.1713bcp-1F);
  g = fma(g, t, 0x1.aba18ap0F);
  g = fma(g, t, -0x1.a45290p+1F);
  g = fma(g, t, 0x1.be4514p0F);
  g = fma(g, t, 1.0F);
  const float below = 0.5F * (tail * g / fma(2, a, 1));
  constexpr float kPeak = 0x1.988454p-2F;  // 1 / sqrt(2 pi)
  return {x > 0 ? 1 - below : below, tail * kPeak};
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
