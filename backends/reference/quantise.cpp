// Rows as they travel: rounded, or quantised with a scale for each row or each 128 values.
#include <algorithm>
#include <cmath>
#include <limits>

#include "backends/reference/kernels.h"
#include "src/util/processor.h"

namespace expar::reference {
namespace {

/// Of `count` values from element `first` on: what they are divided by, and its inverse. Zero where all are zero or so
/// small that the scale would be subnormal; NaN where one is not finite.
struct Scale {
  float scale = 0, inverse = 0;
};

Scale scale_of(const void* rows, DType dtype, std::int64_t first, std::int64_t count, float limit) {
  float most = 0;
  for (std::int64_t i = first; i < first + count; ++i) {
    const float value = std::fabs(load(rows, dtype, i));
    if (!(value <= std::numeric_limits<float>::max())) return {std::numeric_limits<float>::quiet_NaN(), 0};
    most = std::max(most, value);
  }
  if (most < limit * std::numeric_limits<float>::min()) return {};
  return {most / limit, limit / most};
}

void narrow(void* to, DType payload, std::int64_t i, float value) {
  switch (payload) {
    case DType::int8:
      static_cast<std::int8_t*>(to)[i] = static_cast<std::int8_t>(std::nearbyint(value));
      break;
    case DType::fp8_e4m3:
      static_cast<fp8_e4m3*>(to)[i] = fp8_e4m3(value);
      break;
    case DType::f16:
      static_cast<f16*>(to)[i] = f16(value);
      break;
    default:
      store(to, payload, i, value);
  }
}

float widen(const void* from, DType payload, std::int64_t i) {
  switch (payload) {
    case DType::int8:
      return static_cast<const std::int8_t*>(from)[i];
    case DType::fp8_e4m3:
      return static_cast<float>(static_cast<const fp8_e4m3*>(from)[i]);
    case DType::f16:
      return static_cast<float>(static_cast<const f16*>(from)[i]);
    default:
      return load(from, payload, i);
  }
}

}  // namespace

void quantise(const Quantise& p, Pool& pool) {
  const std::int64_t group = scale_group(p.payload, p.width), groups = scales_of(p.payload, p.width);
  pool.run(p.count, [&](std::int64_t i, int) {
    const FloatMode mode;
    const std::int64_t first = (p.index ? p.index[i] : i) * p.width;
    std::byte* const row = static_cast<std::byte*>(p.out) + i * payload_bytes(p.payload, p.width);
    float* const scales = reinterpret_cast<float*>(row);
    void* const values = scales + groups;
    if (groups == 0) {
      for (std::int64_t h = 0; h < p.width; ++h) narrow(values, p.payload, h, load(p.rows, p.dtype, first + h));
    }
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t begin = g * group, end = std::min(begin + group, p.width);
      const Scale s = scale_of(p.rows, p.dtype, first + begin, end - begin, find_payload(p.payload)->limit);
      scales[g] = s.scale;
      for (std::int64_t h = begin; h < end; ++h)
        narrow(values, p.payload, h, s.inverse == 0 ? 0.0F : load(p.rows, p.dtype, first + h) * s.inverse);
    }
  });
}

void dequantise(const Dequantise& p, Pool& pool) {
  const std::int64_t group = scale_group(p.payload, p.width), groups = scales_of(p.payload, p.width);
  pool.run(p.count, [&](std::int64_t i, int) {
    const FloatMode mode;
    const std::byte* const row = static_cast<const std::byte*>(p.rows) + i * payload_bytes(p.payload, p.width);
    const float* const scales = reinterpret_cast<const float*>(row);
    for (std::int64_t h = 0; h < p.width; ++h) {
      const float value = widen(scales + groups, p.payload, h);
      store(p.out, p.dtype, i * p.width + h, groups == 0 ? value : value * scales[h / group]);
    }
  });
}

}  // namespace expar::reference
