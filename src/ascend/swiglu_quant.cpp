// SwiGLU between the products of int8: sums to numbers before it, numbers to int8 after it.
#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <expar/ascend/activation.h>

#include "src/ascend/groups.h"
#include "src/ascend/quantise.h"
#include "src/util/ranges.h"

namespace expar::ascend {
namespace {

constexpr std::int64_t kGrain = 16;  // rows per task

/// Scales or offsets: [G, width], [width] where there are no groups, or, for all values of a group alike, [G].
class PerGroup {
 public:
  PerGroup(const ConstTensor& values, std::int64_t groups) {
    if (values.absent()) return;
    data_ = values.as<float>();
    width_ = values.shape().rank() == 2 ? values.size(1) : groups > 0 ? 1 : values.size(0);
  }
  std::span<const float> of(std::int64_t group) const { return {data_ + group * width_, at(width_)}; }

 private:
  const float* data_ = nullptr;
  std::int64_t width_ = 0;
};

std::int64_t group_of(const std::vector<std::int64_t>& offsets, std::int64_t row) {
  return std::upper_bound(offsets.begin(), offsets.end(), row) - offsets.begin() - 1;
}

/// Rows [gate, up] in f32 to int8.
struct Requantise {
  const Context& context;
  std::vector<std::int64_t> offsets;  // of the groups
  std::int64_t quant_mode;
  PerGroup smooth, offset;

  QuantisedRows run(const ConstTensor& pre) const {
    const std::int64_t rows = pre.size(0), inner = pre.size(1) / 2;
    const Array h(DType::f32, {rows, inner});
    context.kernels().activate(
        {.act = Activation::swiglu, .rows = offsets.back(), .inner = inner, .pre = pre.data(), .h = h.view().data()},
        context.pool());
    QuantisedRows out{Array(DType::int8, {rows, inner}), {}};
    if (quant_mode == 1) out.scale = Array(DType::f32, {rows});
    for_ranges(context.pool(), offsets.back(), kGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t group = group_of(offsets, i);
        const Quantisation quantisation{quant_mode == 0 ? QuantMode::static_scale : QuantMode::per_token, DType::int8,
                                        offset.of(group)};
        std::byte* const scale = quant_mode == 0 ? nullptr : reinterpret_cast<std::byte*>(out.scale.as<float>() + i);
        quantise_row(quantisation, {h.as<float>() + i * inner, {inner}}, smooth.of(group),
                     out.y.view().bytes() + i * inner, scale);
      }
    });
    return out;
  }
};

/// The shape of what each of `width` columns has, of the rows of each group its own.
void check_scale(const std::string& what, const ConstTensor& scale, DType dtype, std::int64_t groups,
                 std::int64_t width) {
  if (scale.absent()) return;
  if (groups > 0) return require(what, scale, dtype, {groups, width});
  require(what, scale, dtype, scale.shape().rank() == 2 ? Shape{1, width} : Shape{width});
}

/// The same of what is multiplied before rounding, which may be one number for each group.
void check_smooth(const std::string& what, const ConstTensor& scale, std::int64_t groups, std::int64_t width) {
  if (groups > 0 && scale.shape().rank() == 1) return require(what, scale, DType::f32, {groups});
  check_scale(what, scale, DType::f32, groups, width);
}

void check_quantisation(std::int64_t quant_mode, const std::string& scale_name, const ConstTensor& scale,
                        const std::string& offset_name, const ConstTensor& offset) {
  require_range("quant_mode", quant_mode, 0, 1);
  if (quant_mode == 0 && scale.absent()) refuse(scale_name + " is missing, which quant_mode 0 needs");
  if (offset.absent()) return;
  if (quant_mode == 1) refuse(offset_name + " is given with quant_mode 1, which takes none");
  require(offset_name, offset, DType::f32, scale.shape());
}

void check_rows(const ConstTensor& x) {
  require_axes("x", x, 2);
  if (x.size(1) % 2 != 0) refuse("x is " + shown(x) + ", whose axis 1 should be even");
}

std::int64_t groups_of(const ConstTensor& list) { return list.absent() ? 0 : list.size(0); }

/// Rows in f32 with the half that is activated first, each element by row(i)(column of x).
template <class Row>
Array gate_first(const Context& context, const ConstTensor& x, std::int64_t rows, bool activate_left, const Row& row) {
  const std::int64_t width = x.size(1), half = width / 2, shift = activate_left ? 0 : half;
  Array pre(DType::f32, x.shape());
  for_ranges(context.pool(), rows, kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto value = row(i);
      for (std::int64_t j = 0; j < width; ++j) pre.as<float>()[i * width + (j + shift) % width] = value(j);
    }
  });
  return pre;
}

/// The scales and biases that make numbers of the int32 sums of a product.
class Dequantise {
 public:
  Dequantise(const ConstTensor& x, const DequantSwigluQuantOptions& options, std::vector<std::int64_t> offsets)
      : x_(x), options_(options), offsets_(std::move(offsets)) {
    const std::int64_t groups = groups_of(options.group_index), width = x.size(1);
    const ConstTensor &weight = options.weight_scale, &activation = options.activation_scale, &bias = options.bias;
    if (x.dtype() != DType::int32) {
      require_numbers("x", x);
      if (!weight.absent()) refuse("weight_scale is given with x of " + std::string(name(x.dtype())));
      if (!activation.absent()) refuse("activation_scale is given with x of " + std::string(name(x.dtype())));
      if (!bias.absent()) refuse("bias is given with x of " + std::string(name(x.dtype())));
      return;
    }
    if (weight.absent()) refuse("weight_scale is missing, which x of int32 needs");
    check_scale("weight_scale", weight, DType::f32, groups, width);
    if (!activation.absent()) {
      const bool is_column = activation.shape().rank() == 2;
      require("activation_scale", activation, DType::f32, is_column ? Shape{x.size(0), 1} : Shape{x.size(0)});
    }
    check_scale("bias", bias, bias.dtype() == DType::int32 ? DType::int32 : DType::f32, groups, width);
  }

  /// The numbers of a row.
  auto operator()(std::int64_t row) const {
    const std::int64_t width = x_.size(1), own = group_of(offsets_, row) * width;
    const bool is_sum = x_.dtype() == DType::int32, adds = is_sum && !options_.bias.absent();
    const float activation =
        is_sum && !options_.activation_scale.absent() ? options_.activation_scale.as<float>()[row] : 1.0F;
    const float* const scale = is_sum ? options_.weight_scale.as<float>() + own : nullptr;
    const bool is_whole = adds && options_.bias.dtype() == DType::int32;
    const std::int32_t* const before = is_whole ? options_.bias.as<std::int32_t>() + own : nullptr;
    const float* const after = adds && !is_whole ? options_.bias.as<float>() + own : nullptr;
    return [=, this](std::int64_t column) {
      if (!is_sum) return number(x_, row * width + column);
      const std::int64_t sum =
          std::int64_t{x_.as<std::int32_t>()[row * width + column]} + (before == nullptr ? 0 : before[column]);
      return static_cast<float>(sum) * scale[column] * activation + (after == nullptr ? 0.0F : after[column]);
    };
  }

 private:
  ConstTensor x_;
  const DequantSwigluQuantOptions& options_;
  std::vector<std::int64_t> offsets_;
};

}  // namespace

QuantisedRows swiglu_quant(const Context& context, ConstTensor x, const SwigluQuantOptions& options) {
  check_rows(x);
  require_numbers("x", x);
  require_range("group_list_type", options.group_list_type, 0, 1);
  const std::int64_t groups = groups_of(options.group_index);
  check_smooth("smooth_scales", options.smooth_scales, groups, x.size(1) / 2);
  check_quantisation(options.quant_mode, "smooth_scales", options.smooth_scales, "offsets", options.offsets);
  const Requantise requantise{
      context, group_offsets("group_index", options.group_index, options.group_list_type, x.size(0)),
      options.quant_mode, PerGroup(options.smooth_scales, groups), PerGroup(options.offsets, groups)};
  const std::int64_t width = x.size(1);
  return requantise.run(gate_first(context, x, requantise.offsets.back(), options.activate_left, [&](std::int64_t row) {
    return [&x, first = row * width](std::int64_t column) { return number(x, first + column); };
  }));
}

QuantisedRows dequant_swiglu_quant(const Context& context, ConstTensor x, const DequantSwigluQuantOptions& options) {
  check_rows(x);
  const std::int64_t groups = groups_of(options.group_index);
  check_smooth("quant_scale", options.quant_scale, groups, x.size(1) / 2);
  check_quantisation(options.quant_mode, "quant_scale", options.quant_scale, "quant_offset", options.quant_offset);
  const Requantise requantise{context, group_offsets("group_index", options.group_index, 1, x.size(0)),
                              options.quant_mode, PerGroup(options.quant_scale, groups),
                              PerGroup(options.quant_offset, groups)};
  const Dequantise dequantise(x, options, requantise.offsets);
  return requantise.run(gate_first(context, x, requantise.offsets.back(), options.activate_left, dequantise));
}

}  // namespace expar::ascend
