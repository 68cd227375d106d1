// RMSNorm (Zhang & Sennrich 2019), forward and backward, whose rows do not depend on how many stand beside them.
#pragma once

#include <cstdint>
#include <span>

#include <expar/context.h>

namespace expar {

/// y = x * scale * gain, scale = 1 / sqrt(mean(x^2) + 1e-5), in f32, rounded once.
///   x, y  : [T, H]  f32 or bf16, the same
///   gain  : [H]  f32
///   scale : [T]  f32, kept for backward
/// Not collective. Cost: one read and one write of the rows.
void rms_norm(const Context& context, ConstTensor x, ConstTensor gain, Tensor y, Tensor scale);

/// dx = residual + gradient of x, rounded once; dgain [S_r, H] per shard, summed over its tokens in order.
///   dy, residual, dx : [T, H]  dtype of x; dx may be the residual; an absent residual is zero
///   shards           : [S_r + 1] from 0 to T
///   dgain            : S_r rows of H elements, `stride` elements apart
/// Not collective. Cost: one read of x, dy and the residual, one write of dx.
void rms_norm_backward(const Context& context, ConstTensor x, ConstTensor gain, ConstTensor scale, ConstTensor dy,
                       ConstTensor residual, std::span<const std::int64_t> shards, Tensor dx, float* dgain,
                       std::int64_t stride);

}  // namespace expar
