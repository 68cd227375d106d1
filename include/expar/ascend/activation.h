// Ascend's gated activations: SwiGLU, its gradient, and the forms that take or give quantised rows.
#pragma once

#include <cstdint>

#include <expar/context.h>

namespace expar::ascend {

/// silu(a) * b of the halves a and b of an axis, silu(a) = a / (1 + exp(-a)); in f32, rounded once.
///   x       : f32, bf16 or f16, any shape; dim counts from the end where it is below 0
///   returns : dtype of x, half as long along dim
/// Not collective. Throws Error: bad_argument (dtype, no such dim, an odd one). Cost: one pass.
/// Source: npu_swiglu.
Array swiglu(const Context& context, ConstTensor x, std::int64_t dim = -1);

/// The gradient of x. grad_output : shape of what swiglu returns, dtype of x. Source: npu_swiglu_backward.
Array swiglu_grad(const Context& context, ConstTensor grad_output, ConstTensor x, std::int64_t dim = -1);

struct ClippedSwigluOptions {
  ConstTensor group_index = {};  // [G] int64 rows of each group: only the first of their sum are computed; or none
  std::int64_t dim = -1;
  float alpha = 1.702F;
  float limit = 7;
  float bias = 1;
  bool interleaved = true;  // a and b take turns along dim; off: halves
};

/// a sigmoid(alpha a) * (b + bias) with a = min(a, limit), b = clamp(b, -limit, limit); otherwise like swiglu.
/// The axes before dim together count rows; those beyond the groups are zeros. Throws also: bad_argument (groups of
/// more rows than x has, a limit that is not above 0). Cost: one pass, and one more where interleaved.
/// Source: npu_clipped_swiglu (GPT-OSS).
Array clipped_swiglu(const Context& context, ConstTensor x, const ClippedSwigluOptions& options = {});

/// What belongs to columns has their shape, or a row of it for each group: [G, ...], if there are groups.
struct SwigluQuantOptions {
  ConstTensor smooth_scales = {};    // [H] or one number for each group [G], f32: multiplied before rounding; needed
                                     // with quant_mode 0
  ConstTensor offsets = {};          // quant_mode 0: shape of smooth_scales, f32, added before rounding
  ConstTensor group_index = {};      // [G] int64, the rows of each group
  bool activate_left = false;        // silu of the first half; off: of the second
  std::int64_t quant_mode = 0;       // 0 static, 1 with a scale for each row
  std::int64_t group_list_type = 0;  // group_index has 0 sums so far, 1 counts
};

struct QuantisedRows {
  Array y;      // [T, H] int8
  Array scale;  // [T] f32; with quant_mode 0 none
};

/// SwiGLU of rows, then int8 as quant_mode 1 and 2 of the dispatch: what is stored is rounded half to even.
///   x : [T, 2H]  f32, bf16 or f16
/// Rows beyond the groups are zeros. Not collective.
/// Throws Error: bad_argument (shapes, dtypes, groups of more rows than x has, an option out of its range or without
/// another it needs). Cost: one pass. Source: npu_swiglu_quant.
QuantisedRows swiglu_quant(const Context& context, ConstTensor x, const SwigluQuantOptions& options = {});

/// As above.
struct DequantSwigluQuantOptions {
  ConstTensor weight_scale = {};      // [2H] f32; with int32 x needed, else none
  ConstTensor activation_scale = {};  // [T] or [T, 1] f32, only with int32 x; or none
  ConstTensor bias = {};              // [2H] f32, or int32, which is added before the scales; only with int32 x
  ConstTensor quant_scale = {};       // [H] or [G] f32, multiplied before rounding; needed with quant_mode 0
  ConstTensor quant_offset = {};      // quant_mode 0: shape of quant_scale, f32
  ConstTensor group_index = {};       // [G] int64 counts of rows
  bool activate_left = false;
  std::int64_t quant_mode = 0;
};

/// swiglu_quant of x * weight_scale * activation_scale + bias, in f32.
///   x : [T, 2H]  int32 sums of an int8 product, or f32, bf16 or f16
/// Otherwise like swiglu_quant. Source: npu_dequant_swiglu_quant.
QuantisedRows dequant_swiglu_quant(const Context& context, ConstTensor x,
                                   const DequantSwigluQuantOptions& options = {});

}  // namespace expar::ascend
