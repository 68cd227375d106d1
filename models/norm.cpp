// RMSNorm, row by row.
#include "models/norm.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace expar {
namespace {

constexpr float kEpsilon = 1e-5F;

// Sums of products run in eight chains, which the compiler turns into vectors; element j always joins
// chain j % 8, so the order does not depend on the machine's vectors.
template <class F>
float sum_over(std::int64_t count, F&& term) {
  std::array<float, 8> chains{};
  std::int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    for (std::int64_t c = 0; c < 8; ++c) chains[static_cast<std::size_t>(c)] += term(j + c);
  }
  for (std::int64_t c = 0; j < count; ++j, ++c) chains[static_cast<std::size_t>(c)] += term(j);
  return ((chains[0] + chains[1]) + (chains[2] + chains[3])) + ((chains[4] + chains[5]) + (chains[6] + chains[7]));
}

template <class T>
float row_scale(const T* x, std::int64_t width) {
  const float squares = sum_over(width, [x](std::int64_t j) {
    const auto value = static_cast<float>(x[j]);
    return value * value;
  });
  return 1.0F / std::sqrt(squares / static_cast<float>(width) + kEpsilon);
}

template <class T>
void forward_row(const T* x, const float* gain, float scale, std::int64_t width, T* y) {
  for (std::int64_t j = 0; j < width; ++j) y[j] = T(static_cast<float>(x[j]) * scale * gain[j]);
}

// With n = x * scale and g = dy * gain: dx = scale * (g - n * mean(g * n)).
template <class T>
void backward_row(const T* x, const float* gain, float scale, const T* dy, const T* residual, std::int64_t width, T* dx,
                  float* dgain) {
  const float mean = sum_over(width,
                              [=](std::int64_t j) {
                                return static_cast<float>(dy[j]) * gain[j] * (static_cast<float>(x[j]) * scale);
                              }) /
                     static_cast<float>(width);
  for (std::int64_t j = 0; j < width; ++j) {
    const float normed = static_cast<float>(x[j]) * scale;
    const auto dyj = static_cast<float>(dy[j]);
    const float base = residual != nullptr ? static_cast<float>(residual[j]) : 0.0F;
    dgain[j] += dyj * normed;
    dx[j] = T(base + scale * (dyj * gain[j] - normed * mean));
  }
}

template <class T>
void forward(const Context& context, ConstTensor x, ConstTensor gain, Tensor y, Tensor scale) {
  constexpr std::int64_t kRows = 64;  // of one task; any number gives the same bits
  const std::int64_t rows = x.size(0), width = x.size(1);
  context.pool().run((rows + kRows - 1) / kRows, [&](std::int64_t task, int) {
    for (std::int64_t i = task * kRows; i < std::min(rows, (task + 1) * kRows); ++i) {
      const T* row = x.as<T>() + i * width;
      const float s = scale.as<float>()[i] = row_scale(row, width);
      forward_row(row, gain.as<float>(), s, width, y.as<T>() + i * width);
    }
  });
}

template <class T>
void backward(const Context& context, ConstTensor x, ConstTensor gain, ConstTensor scale, ConstTensor dy,
              ConstTensor residual, std::span<const std::int64_t> shards, Tensor dx, float* dgain,
              std::int64_t stride) {
  const std::int64_t width = x.size(1);
  const T* base = residual.absent() ? nullptr : residual.as<T>();
  context.pool().run(static_cast<std::int64_t>(shards.size()) - 1, [&](std::int64_t shard, int) {
    float* sum = dgain + shard * stride;
    std::fill_n(sum, width, 0.0F);
    const auto s = static_cast<std::size_t>(shard);
    for (std::int64_t i = shards[s]; i < shards[s + 1]; ++i) {
      const std::int64_t at = i * width;
      backward_row(x.as<T>() + at, gain.as<float>(), scale.as<float>()[i], dy.as<T>() + at,
                   base != nullptr ? base + at : nullptr, width, dx.as<T>() + at, sum);
    }
  });
}

}  // namespace

void rms_norm(const Context& context, ConstTensor x, ConstTensor gain, Tensor y, Tensor scale) {
  if (x.dtype() == DType::bf16) return forward<bf16>(context, x, gain, y, scale);
  forward<float>(context, x, gain, y, scale);
}

void rms_norm_backward(const Context& context, ConstTensor x, ConstTensor gain, ConstTensor scale, ConstTensor dy,
                       ConstTensor residual, std::span<const std::int64_t> shards, Tensor dx, float* dgain,
                       std::int64_t stride) {
  const auto run = x.dtype() == DType::bf16 ? backward<bf16> : backward<float>;
  run(context, x, gain, scale, dy, residual, shards, dx, dgain, stride);
}

}  // namespace expar
