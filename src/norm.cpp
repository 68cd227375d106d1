// RMSNorm over tensors: checks, and the backward pass row by row.
#include <expar/norm.h>

#include <algorithm>
#include <array>
#include <string>

#include "src/util/check.h"

namespace expar {
namespace {

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

NormOutput checked(const RmsNorm& norm, DType dtype, const Shape& rows) {
  if (norm.y.absent()) return {};
  if ((dtype != DType::f32 && dtype != DType::bf16) || rows.rank() != 2) {
    throw Error(ErrorCode::bad_argument,
                "a norm's rows are " + std::string(name(dtype)) + " " + rows.str() + ", not [T, H] of f32 or bf16");
  }
  require("the norm's gain", norm.gain, DType::f32, Shape{rows[1]});
  require("the norm's y", norm.y, dtype, rows);
  if (!norm.scale.absent()) require("the norm's scale", norm.scale, DType::f32, Shape{rows[0]});
  if (!(norm.epsilon >= 0)) {
    throw Error(ErrorCode::bad_argument, "the norm's epsilon is " + std::to_string(norm.epsilon) + ", not from 0 on");
  }
  return {.gain = norm.gain.as<float>(),
          .epsilon = norm.epsilon,
          .y = norm.y.data(),
          .scale = norm.scale.absent() ? nullptr : norm.scale.as<float>()};
}

void rms_norm(const Context& context, ConstTensor x, const RmsNorm& norm) {
  require("the norm's y", norm.y, x.dtype(), x.shape());
  const NormOutput output = checked(norm, x.dtype(), x.shape());
  context.kernels().rms_norm(
      {.tokens = x.size(0), .width = x.size(1), .dtype = x.dtype(), .x = x.data(), .norm = output}, context.pool());
}

void rms_norm_backward(const Context& context, ConstTensor x, ConstTensor gain, ConstTensor scale, ConstTensor dy,
                       ConstTensor residual, std::span<const std::int64_t> shards, Tensor dx, float* dgain,
                       std::int64_t stride) {
  const auto run = x.dtype() == DType::bf16 ? backward<bf16> : backward<float>;
  run(context, x, gain, scale, dy, residual, shards, dx, dgain, stride);
}

}  // namespace expar
