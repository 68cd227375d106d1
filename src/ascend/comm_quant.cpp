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

std::int64_t scales_at(std::int64_t h) { return (h + 31) / 32 * 32; }

/// Calls body with a value of the dtype, f16 or bf16.
template <class Body>
void with_half(DType dtype, const Body& body) {
  if (dtype == DType::f16) return body(f16());
  body(bf16());
}

/// q and scale of `count` values. A number below 2^22 plus 1.5 2^23 has its nearest integer in the low bits, which
/// vectorises where rounding by the library does not.
template <class E>
void quantise(const E* x, std::int64_t count, std::int8_t* q, E& stored) {
  std::array<float, kBlock> values{};
  std::array<std::int8_t, kBlock> codes{};
  for (std::int64_t i = 0; i < count; ++i) values[at(i)] = static_cast<float>(x[i]);
  std::int32_t most = 0;  // of magnitudes as words, where NaN is above infinity and that above all numbers
  for (const float value : values) most = std::max(most, std::bit_cast<std::int32_t>(value) & 0x7fffffff);
  const float scale = most < 0x7f800000 ? std::bit_cast<float>(most) / 127 : std::numeric_limits<float>::quiet_NaN();
  if (scale > 0) {
    for (std::size_t i = 0; i < codes.size(); ++i) {
      const float code = std::min(std::max(values[i] / scale, -127.0F), 127.0F);  // a subnormal scale is a coarse one
      codes[i] = static_cast<std::int8_t>(std::bit_cast<std::uint32_t>(code + 0x1.8p23F));
    }
  }
  std::copy_n(codes.begin(), count, q);
  stored = E(scale);
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

/// Calls body(first, count) for each block of a row.
template <class Body>
void for_blocks(std::int64_t h, const Body& body) {
  std::int64_t first = 0;
  for (; first + kBlock <= h; first += kBlock) body(first, kBlock);
  if (first < h) body(first, h - first);
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
      for_blocks(h, [&](std::int64_t first, std::int64_t count) {
        quantise(x + first, count, q + first, scales[first / kBlock]);
      });
    });
  });
}

void comm_dequantise(const std::byte* row, Tensor out) {
  with_half(out.dtype(), [&](auto half) {
    using E = decltype(half);
    const auto* const q = reinterpret_cast<const std::int8_t*>(row);
    const E* const scales = reinterpret_cast<const E*>(row + scales_at(out.elements()));
    for_blocks(out.elements(), [&](std::int64_t first, std::int64_t count) {
      dequantise(q + first, scales[first / kBlock], count, out.as<E>() + first);
    });
  });
}

}  // namespace expar::ascend
