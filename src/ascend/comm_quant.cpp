// The results' int8.
#include "src/ascend/comm_quant.h"

#include <algorithm>
#include <cmath>
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

/// Of `count` values; 0 where all are, NaN where one is not finite.
template <class E>
float scale_of(const E* x, std::int64_t count) {
  float most = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = std::fabs(static_cast<float>(x[i]));
    if (!(value <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
    most = std::max(most, value);
  }
  return most / 127;
}

template <class E>
void quantise(const E* x, std::int64_t h, std::byte* out) {
  auto* const q = reinterpret_cast<std::int8_t*>(out);
  E* const scales = reinterpret_cast<E*>(out + scales_at(h));
  for (std::int64_t first = 0; first < h; first += kBlock) {
    const std::int64_t count = std::min(kBlock, h - first);
    const float scale = scale_of(x + first, count);
    scales[first / kBlock] = E(scale);
    for (std::int64_t i = first; i < first + count; ++i)
      q[i] = scale > 0 ? static_cast<std::int8_t>(std::nearbyint(static_cast<float>(x[i]) / scale)) : std::int8_t{0};
  }
}

}  // namespace

void comm_quantise(Pool& pool, ConstTensor rows, Tensor out) {
  const std::int64_t h = rows.size(1), row_bytes = out.size(1);
  with_half(rows.dtype(), [&](auto half) {
    using E = decltype(half);
    pool.run(rows.size(0), [&](std::int64_t i, int) {
      quantise(static_cast<const E*>(rows.data()) + i * h, h, out.bytes() + i * row_bytes);
    });
  });
}

void comm_dequantise(const std::byte* row, Tensor out) {
  const std::int64_t h = out.elements();
  with_half(out.dtype(), [&](auto half) {
    using E = decltype(half);
    const auto* const q = reinterpret_cast<const std::int8_t*>(row);
    const E* const scales = reinterpret_cast<const E*>(row + scales_at(h));
    for (std::int64_t i = 0; i < h; ++i)
      out.as<E>()[i] = E(static_cast<float>(q[i]) * static_cast<float>(scales[i / kBlock]));
  });
}

}  // namespace expar::ascend
