// RMSNorm (Zhang & Sennrich 2019), forward and backward, whose rows do not depend on how many stand beside them.
#pragma once

#include <cstdint>
#include <span>

#include <expar/context.h>
#include <expar/kernels.h>

namespace expar {

/// What a norm of rows x [T, H] reads and writes beside them.
struct RmsNorm {
  ConstTensor gain = {};  // [H] f32
  float epsilon = 1e-6F;
  Tensor y = {};      // [T, H] dtype of x, which it may be
  Tensor scale = {};  // [T] f32, for backward; may be absent
};

/// y = (x * scale) * gain with scale = 1 / sqrt(mean(x^2) + epsilon), in f32; each product is rounded to y's dtype, as
/// in transformers and in torch_npu's fused operators. The norm after a combine costs less there: CombineOptions::norm.
///   x : [T, H]  f32 or bf16
/// Not collective. Throws Error: bad_argument (shapes, dtypes, a negative epsilon). Cost: one read and one write of the
/// rows.
void rms_norm(const Context& context, ConstTensor x, const RmsNorm& norm);

/// The norm as Kernels::reduce takes it, for rows of that shape; none where its y is absent. Throws as rms_norm.
NormOutput checked(const RmsNorm& norm, DType dtype, const Shape& rows);

/// dx = residual + gradient of x, in f32, rounded once; dgain [S, H] per shard, summed over its tokens in order.
///   x, gain, scale   : as rms_norm left them
///   dy, residual, dx : [T, H]  dtype of x; dx may be the residual; an absent residual is zero
///   shards           : [S + 1] from 0 to T
///   dgain            : S rows of H elements, `stride` elements apart
/// The gradient of the rounding is taken as one. Not collective. Throws Error: bad_argument (dtypes); shapes and shards
/// are not checked. Cost: one read of x, dy and the residual, one write of dx.
void rms_norm_backward(const Context& context, ConstTensor x, ConstTensor gain, ConstTensor scale, ConstTensor dy,
                       ConstTensor residual, std::span<const std::int64_t> shards, Tensor dx, float* dgain,
                       std::int64_t stride);

}  // namespace expar
