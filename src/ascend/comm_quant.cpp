// The results' int8.
#include "src/ascend/comm_quant.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "src/util/check.h"

namespace expar::ascend {
namespace {

constexpr std::int64_t kBlock = 8;
constexpr std::int64_t kPiece = 32 * kBlock;  // values that are worked on at a time

std::int64_t scales_at(std::int64_t h) { return (h + 31) / 32 * 32; }

/// Calls body with a value of the dtype, f16 or bf16.
template <class Body>
void with_half(DType dtype, const Body& body) {
  if (dtype == DType::f16) return body(f16());
  body(bf16());
}

/// q and scales of up to kPiece values. The last loop vectorises: a sum with 1.5 2^23 has the nearest integer in its
/// low bits, and integers are held in range where floats, which may be NaN for all the compiler knows, would be
/// branches.
template <class E>
void quantise(const E* x, std::int64_t count, std::int8_t* q, E* scales) {
  std::array<float, kPiece> values, divisors;
  for (std::int64_t i = 0; i < count; ++i) values[at(i)] = static_cast<float>(x[i]);
  std::fill(values.begin() + count, values.end(), 0.0F);
  for (std::int64_t first = 0; first < count; first += kBlock) {
    float* const block = &values[at(first)];
    std::int32_t most = 0;  // of magnitudes as words, where NaN is above infinity and that above all numbers
    for (std::int64_t i = 0; i < kBlock; ++i) most = std::max(most, std::bit_cast<std::int32_t>(block[i]) & 0x7fffffff);
    const bool finite = most < 0x7f800000;
    const float scale = finite ? std::bit_cast<float>(most) / 127 : std::numeric_limits<float>::quiet_NaN();
    if (!(scale > 0)) std::fill_n(block, kBlock, 0.0F);
    std::fill_n(&divisors[at(first)], kBlock, scale > 0 ? scale : 1.0F);
    scales[first / kBlock] = E(scale);
  }
  constexpr float kRound = 0x1.8p23F;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t code =
        std::bit_cast<std::int32_t>(values[at(i)] / divisors[at(i)] + kRound) - std::bit_cast<std::int32_t>(kRound);
    q[i] = static_cast<std::int8_t>(std::clamp(code, -127, 127));  // beyond where the scale is subnormal, so coarse
  }
}

/// q * scale, rounded.
void dequantise(const std::int8_t* q, f16 scale, std::int64_t count, f16* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = f16(static_cast<float>(q[i]) * static_cast<float>(scale));
}
void dequantise(const std::int8_t* q, bf16 scale, std::int64_t count, bf16* out) {
  const auto factor = static_cast<float>(scale);
  if (std::isnan(factor)) {
    std::fill_n(out, count, scale);
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {  // bf16's own rounding without its question for NaN
    const auto u = std::bit_cast<std::uint32_t>(static_cast<float>(q[i]) * factor);
    out[i].bits = static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
}

}  // namespace

void comm_quantise(Pool& pool, ConstTensor rows, Tensor out) {
  const std::int64_t h = rows.size(1), row_bytes = out.size(1);
  with_half(rows.dtype(), [&](auto half) {
    using E = decltype(half);
    pool.run(rows.size(0), [&](std::int64_t row, int) {
      const E* const x = static_cast<const E*>(rows.data()) + row * h;
      std::byte* const to = out.bytes() + row * row_bytes;
      auto* const q = reinterpret_cast<std::int8_t*>(to);
      E* const scales = reinterpret_cast<E*>(to + scales_at(h));
      for (std::int64_t first = 0; first < h; first += kPiece)
        quantise(x + first, std::min(kPiece, h - first), q + first, scales + first / kBlock);
    });
  });
}

void comm_dequantise(const std::byte* row, Tensor out) {
  with_half(out.dtype(), [&](auto half) {
    using E = decltype(half);
    const auto* const q = reinterpret_cast<const std::int8_t*>(row);
    const E* const scales = reinterpret_cast<const E*>(row + scales_at(out.elements()));
    const std::int64_t h = out.elements();
    for (std::int64_t first = 0; first < h; first += kBlock)
      dequantise(q + first, scales[first / kBlock], std::min(kBlock, h - first), out.as<E>() + first);
  });
}

}  // namespace expar::ascend
