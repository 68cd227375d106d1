// Rows as they travel: rounded, or quantised with a scale for each row or each 128 values.
#pragma once

#include "backends/cpu/number.h"
#include "backends/cpu/work.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

// ---- Numbers narrower than a bf16, in integers: an addition that leaves the rounded fraction in the low bits stands
// ---- in for subnormals.

struct F16 {
  std::uint16_t bits;
};
struct E4m3 {
  std::uint8_t bits;
};

inline float with_sign_of(float magnitude, Word sign) { return as_float(as_word(magnitude) | (sign & 0x80000000u)); }

inline F16 to_f16(float value) {
  const Word u = as_word(value), a = u & 0x7fffffffu;
  const Word normal = ((a + 0xfffu + ((a >> 13) & 1u)) >> 13) - (112u << 10);
  const Word subnormal = as_word(as_float(a) + 0.5F) - as_word(0.5F);
  Word code = a < 0x38800000u ? subnormal : normal;
  code = code > 0x7c00u ? 0x7c00u : code;
  code = a > 0x7f800000u ? 0x7e00u | ((a >> 13) & 0x3ffu) : code;
  return {static_cast<std::uint16_t>(code | ((u >> 16) & 0x8000u))};
}

inline float from_f16(F16 value) {
  const Word a = value.bits & 0x7fffu;
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(a)) * 0x1p-24F;
  const float normal = as_float((a << 13) + ((a < 0x7c00u ? 112u : 224u) << 23));
  return with_sign_of(a < 0x400u ? subnormal : normal, static_cast<Word>(value.bits) << 16);
}

/// Of a value that is no NaN and, rounded, not above 448.
inline E4m3 to_e4m3(float value) {
  const Word u = as_word(value), a = u & 0x7fffffffu;
  const Word normal = ((a + 0x7ffffu + ((a >> 20) & 1u)) >> 20) - (120u << 3);
  const Word subnormal = as_word(as_float(a) + 0x1p14F) - as_word(0x1p14F);
  return {static_cast<std::uint8_t>((a < 0x3c800000u ? subnormal : normal) | ((u >> 24) & 0x80u))};
}

inline float from_e4m3(E4m3 value) {
  const Word a = value.bits & 0x7fu;
  const float subnormal = static_cast<float>(static_cast<std::int32_t>(a)) * 0x1p-9F;
  const float normal = as_float((a << 20) + (120u << 23));
  const float number = a < 8 ? subnormal : normal;
  return with_sign_of(a == 0x7fu ? as_float(0x7fc00000u) : number, static_cast<Word>(value.bits) << 24);
}

/// The integer nearest to a value of magnitude below 2^21, ties to even.
inline std::int8_t to_int8(float value) { return static_cast<std::int8_t>(as_word(value + 0x1.8p23F)); }

// ---- Rows ----------------------------------------------------------------------------------------

struct Scale {
  float scale, inverse;
};

/// Magnitudes are compared as words: NaN is above infinity, infinity above all numbers.
template <class E>
Scale scale_of(const E* values, std::int64_t count, float limit) {
  Word most = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Word a = as_word(widen(values[i])) & 0x7fffffffu;
    most = a > most ? a : most;
  }
  if (most >= 0x7f800000u) return {as_float(0x7fc00000u), 0};
  if (as_float(most) < limit * 0x1p-126F) return {0, 0};
  return {as_float(most) / limit, limit / as_float(most)};
}

template <class E>
void quantise_row(DType payload, const E* from, std::int64_t width, std::byte* row) {
  if (payload == DType::f16) {
    F16* const to = reinterpret_cast<F16*>(row);
#pragma GCC ivdep
    for (std::int64_t h = 0; h < width; ++h) to[h] = to_f16(widen(from[h]));
    return;
  }
  if (payload == DType::bf16) {
    std::uint16_t* const to = reinterpret_cast<std::uint16_t*>(row);
#pragma GCC ivdep
    for (std::int64_t h = 0; h < width; ++h) to[h] = narrow<std::uint16_t>(widen(from[h]));
    return;
  }
  const float limit = find_payload(payload)->limit;
  const std::int64_t group = scale_group(payload, width), groups = scales_of(payload, width);
  float* const scales = reinterpret_cast<float*>(row);
  std::byte* const values = row + groups * static_cast<std::int64_t>(sizeof(float));
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t first = g * group, count = smaller(group, width - first);
    const Scale s = scale_of(from + first, count, limit);
    scales[g] = s.scale;
    if (s.inverse == 0) {
      __builtin_memset(values + first, 0, static_cast<std::size_t>(count));
    } else if (payload == DType::int8) {
      std::int8_t* const to = reinterpret_cast<std::int8_t*>(values + first);
#pragma GCC ivdep
      for (std::int64_t h = 0; h < count; ++h) to[h] = to_int8(widen(from[first + h]) * s.inverse);
    } else {
      E4m3* const to = reinterpret_cast<E4m3*>(values + first);
#pragma GCC ivdep
      for (std::int64_t h = 0; h < count; ++h) to[h] = to_e4m3(widen(from[first + h]) * s.inverse);
    }
  }
}

static_assert(std::size(kPayloads) == 4, "the last branch of these two is fp8_e4m3: a new payload needs its own");

template <class E>
void dequantise_row(DType payload, const std::byte* row, std::int64_t width, E* out) {
  if (payload == DType::f16) {
    const F16* const from = reinterpret_cast<const F16*>(row);
#pragma GCC ivdep
    for (std::int64_t h = 0; h < width; ++h) out[h] = narrow<E>(from_f16(from[h]));
    return;
  }
  if (payload == DType::bf16) {
    const std::uint16_t* const from = reinterpret_cast<const std::uint16_t*>(row);
#pragma GCC ivdep
    for (std::int64_t h = 0; h < width; ++h) out[h] = narrow<E>(widen(from[h]));
    return;
  }
  const std::int64_t group = scale_group(payload, width), groups = scales_of(payload, width);
  const float* const scales = reinterpret_cast<const float*>(row);
  const std::byte* const values = row + groups * static_cast<std::int64_t>(sizeof(float));
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t first = g * group, last = smaller(first + group, width);
    const float scale = scales[g];
    if (payload == DType::int8) {
      const std::int8_t* const from = reinterpret_cast<const std::int8_t*>(values);
#pragma GCC ivdep
      for (std::int64_t h = first; h < last; ++h) out[h] = narrow<E>(static_cast<float>(from[h]) * scale);
    } else {
      const E4m3* const from = reinterpret_cast<const E4m3*>(values);
#pragma GCC ivdep
      for (std::int64_t h = first; h < last; ++h) out[h] = narrow<E>(from_e4m3(from[h]) * scale);
    }
  }
}

inline void quantise(const Quantise& p, Pool& pool) {
  const std::int64_t bytes = payload_bytes(p.payload, p.width);
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    const E* const rows = static_cast<const E*>(p.rows);
    for_blocks(pool, p.count, bytes + p.width * static_cast<std::int64_t>(sizeof(E)),
               [&](std::int64_t i, std::int64_t last) {
                 for (; i < last; ++i) {
                   const std::int64_t row = p.index != nullptr ? p.index[i] : i;
                   quantise_row(p.payload, rows + row * p.width, p.width, static_cast<std::byte*>(p.out) + i * bytes);
                 }
               });
  });
}

inline void dequantise(const Dequantise& p, Pool& pool) {
  const std::int64_t bytes = payload_bytes(p.payload, p.width);
  with_element(p.dtype, [&](auto element) {
    using E = decltype(element);
    E* const out = static_cast<E*>(p.out);
    for_blocks(
        pool, p.count, bytes + p.width * static_cast<std::int64_t>(sizeof(E)), [&](std::int64_t i, std::int64_t last) {
          for (; i < last; ++i) {
            dequantise_row(p.payload, static_cast<const std::byte*>(p.rows) + i * bytes, p.width, out + i * p.width);
          }
        });
  });
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
