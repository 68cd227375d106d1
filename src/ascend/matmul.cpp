// The grouped product, by the kernels of the backend where they have its dtype.
#include <expar/ascend/matmul.h>

#include <algorithm>
#include <string>
#include <vector>

#include "src/ascend/groups.h"
#include "src/util/ranges.h"

namespace expar::ascend {
namespace {

constexpr std::int64_t kGrain = 16;  // rows per task
constexpr std::int64_t kMaxGroups = 1024;
constexpr std::int64_t kMaxInt8Sum = (std::int64_t{1} << 17) - 1;  // products of 2^14 that an int32 has room for

void check_groups(const ConstTensor& list, std::int64_t groups) {
  if (list.absent()) refuse("group_list is missing");
  require("group_list", list, DType::int64, {groups});
  require_range("E of group_list", groups, 1, kMaxGroups);
}

DType output_dtype(const ConstTensor& x, const GroupedMatmulOptions& options) {
  const bool is_int8 = x.dtype() == DType::int8;
  if (is_int8 && !options.output_dtype) refuse("output_dtype is missing, which x of int8 needs");
  const DType dtype = options.output_dtype.value_or(x.dtype());
  const bool is_number = dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16;
  if (is_number || (is_int8 && dtype == DType::int32)) return dtype;
  refuse("output_dtype is " + std::string(name(dtype)) + ", should be f32, bf16 or f16" +
         (is_int8 ? ", or int32" : ""));
}

void refuse_given(const char* what, const ConstTensor& tensor, const std::string& with) {
  if (!tensor.absent()) refuse(std::string(what) + " is given with " + with + ", which takes none");
}

/// y rounded to `dtype`, of its first rows; those beyond were never written.
Array rounded(Array y, DType dtype) { return dtype == y.view().dtype() ? std::move(y) : converted(y, dtype); }

// ---- Rows split into groups ------------------------------------------------------------------------

/// A product of rows with the matrix of their group.
struct RowProduct {
  const Context& context;
  ConstTensor x, weight;
  const GroupedMatmulOptions& options;
  DType out;
  std::vector<std::int64_t> offsets;

  std::int64_t rows() const { return x.size(0); }
  std::int64_t inner() const { return x.size(1); }
  std::int64_t columns() const { return weight.size(2); }

  void check() const {
    const Shape biases{weight.size(0), columns()};
    const bool takes_integers =
        x.dtype() == DType::int8 && (out == DType::int32 || options.bias.dtype() == DType::int32);
    if (!options.bias.absent()) {
      if (!takes_integers) require_numbers("bias", options.bias);
      require("bias", options.bias, takes_integers ? DType::int32 : options.bias.dtype(), biases);
    }
    if (x.dtype() != DType::int8) {
      refuse_given("scale", options.scale, "x of " + std::string(name(x.dtype())));
      refuse_given("per_token_scale", options.per_token_scale, "x of " + std::string(name(x.dtype())));
      return;
    }
    require_range("K of x", inner(), 0, kMaxInt8Sum);
    if (out == DType::int32) {
      refuse_given("scale", options.scale, "output_dtype int32");
      return refuse_given("per_token_scale", options.per_token_scale, "output_dtype int32");
    }
    if (options.scale.absent()) refuse("scale is missing, which x of int8 needs");
    require("scale", options.scale, DType::f32, biases);
    if (!options.per_token_scale.absent()) require("per_token_scale", options.per_token_scale, DType::f32, {rows()});
  }

  Array run() const {
    if (x.dtype() == DType::int8) return of_int8();
    if (x.dtype() == DType::f16) {
      const Array wide_x = converted(x, DType::f32), wide_weight = converted(weight, DType::f32);
      return rounded(RowProduct{context, wide_x, wide_weight, options, DType::f32, offsets}.of_numbers(), out);
    }
    return of_numbers();
  }

 private:
  Array of_numbers() const {
    // The kernel rounds what nothing is added to.
    const bool is_final = options.bias.absent() && (out == DType::f32 || out == x.dtype());
    Array y(is_final ? out : DType::f32, {rows(), columns()});
    if (y.view().elements() > 0 && inner() > 0) {
      context.kernels().gemm_nn({.groups = {static_cast<int>(offsets.size()) - 1, offsets.data()},
                                 .n = inner(),
                                 .k = columns(),
                                 .dy = x.data(),
                                 .w = {.data = weight.data(), .dtype = weight.dtype()},
                                 .dx = y.view().data(),
                                 .dx_dtype = y.view().dtype()},
                                context.pool());
    }
    if (!options.bias.absent()) add_bias(y.as<float>());
    return rounded(std::move(y), out);
  }

  void add_bias(float* y) const {
    for (std::size_t e = 0; e + 1 < offsets.size(); ++e) {
      for (std::int64_t i = offsets[e] * columns(); i < offsets[e + 1] * columns(); ++i) {
        y[i] += number(options.bias, static_cast<std::int64_t>(e) * columns() + i % columns());
      }
    }
  }

  /// By the kernel of bf16, which has every int8, in pieces whose sums f32 has exactly.
  Array of_int8() const {
    constexpr std::int64_t kPiece = 1024;  // products of at most 2^14 each that add up to 2^24
    Array y(out, {rows(), columns()});
    if (y.view().elements() == 0) return y;
    Buffer left_memory, right_memory, part_memory;
    std::vector<std::int32_t> sums;
    for (std::int64_t e = 0; e < weight.size(0); ++e) {
      const std::int64_t first = offsets[at(e)], count = offsets[at(e) + 1] - first, bounds[] = {0, count};
      sums.assign(at(count * columns()), 0);
      for (std::int64_t k = 0; k < inner() && count > 0; k += kPiece) {
        const std::int64_t depth = std::min(kPiece, inner() - k);
        const Tensor left = left_memory.view(DType::bf16, {count, depth});
        const Tensor right = right_memory.view(DType::bf16, {depth, columns()});
        const Tensor part = part_memory.view(DType::f32, {count, columns()});
        widen(x.as<std::int8_t>() + first * inner() + k, inner(), left);
        widen(weight.as<std::int8_t>() + (e * inner() + k) * columns(), columns(), right);
        context.kernels().gemm_nn({.groups = {1, bounds},
                                   .n = depth,
                                   .k = columns(),
                                   .dy = left.data(),
                                   .w = {.data = right.data(), .dtype = DType::bf16},
                                   .dx = part.data()},
                                  context.pool());
        const float* const products = part.as<float>();
        for_ranges(context.pool(), count, kGrain, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t i = begin * columns(); i < end * columns(); ++i) {
            sums[at(i)] += static_cast<std::int32_t>(products[i]);
          }
        });
      }
      for_ranges(context.pool(), count, kGrain, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin * columns(); i < end * columns(); ++i) {
          write(y, e, first + i / columns(), i % columns(), sums[at(i)]);
        }
      });
    }
    return y;
  }

  /// Rows that lie `stride` values apart, as bf16.
  void widen(const std::int8_t* from, std::int64_t stride, const Tensor& to) const {
    const std::int64_t width = to.size(1);
    bf16* const values = to.as<bf16>();
    for_ranges(context.pool(), to.size(0), kGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        for (std::int64_t j = 0; j < width; ++j) values[i * width + j] = bf16(static_cast<float>(from[i * stride + j]));
      }
    });
  }

  void write(const Tensor& y, std::int64_t group, std::int64_t row, std::int64_t column, std::int32_t product) const {
    const std::int64_t place = row * columns() + column, own = group * columns() + column;
    const bool is_biased = !options.bias.absent(), is_whole = is_biased && options.bias.dtype() == DType::int32;
    const std::int64_t sum = std::int64_t{product} + (is_whole ? options.bias.as<std::int32_t>()[own] : 0);
    if (out == DType::int32) {
      y.as<std::int32_t>()[place] = static_cast<std::int32_t>(sum);
      return;
    }
    const float token = options.per_token_scale.absent() ? 1.0F : options.per_token_scale.as<float>()[row];
    const float value = static_cast<float>(sum) * options.scale.as<float>()[own] * token;
    set_number(y, place, is_biased && !is_whole ? value + number(options.bias, own) : value);
  }
};

Array split_rows(const Context& context, const ConstTensor& x, const ConstTensor& weight,
                 const GroupedMatmulOptions& options) {
  require_axes("weight", weight, 3);
  require("weight", weight, x.dtype(), {weight.size(0), x.size(1), weight.size(2)});
  check_groups(options.group_list, weight.size(0));
  const RowProduct product{context,
                           x,
                           weight,
                           options,
                           output_dtype(x, options),
                           group_offsets("group_list", options.group_list, options.group_list_type, x.size(0))};
  product.check();
  return product.run();
}

// ---- The sum split into groups ---------------------------------------------------------------------

Array split_sum(const Context& context, const ConstTensor& x, const ConstTensor& weight,
                const GroupedMatmulOptions& options) {
  require_numbers("x", x);
  require_axes("weight", weight, 2);
  require("weight", weight, x.dtype(), {x.size(0), weight.size(1)});
  for (const auto& [what, tensor] : {std::pair{"bias", &options.bias}, std::pair{"scale", &options.scale},
                                     std::pair{"per_token_scale", &options.per_token_scale}}) {
    refuse_given(what, *tensor, "group_type 2");
  }
  const DType out = output_dtype(x, options);
  check_groups(options.group_list, options.group_list.shape().rank() == 1 ? options.group_list.size(0) : 0);
  const std::vector<std::int64_t> offsets =
      group_offsets("group_list", options.group_list, options.group_list_type, x.size(0));
  const auto groups = static_cast<std::int64_t>(offsets.size()) - 1;
  const bool is_half = x.dtype() == DType::f16;
  const Array wide_x = is_half ? converted(x, DType::f32) : Array();
  const Array wide_weight = is_half ? converted(weight, DType::f32) : Array();
  const ConstTensor left = is_half ? wide_x : x, right = is_half ? wide_weight : weight;
  Array y(DType::f32, {groups, x.size(1), weight.size(1)});
  if (y.view().elements() > 0) {
    context.kernels().gemm_tn(
        {.groups = {static_cast<int>(groups), offsets.data()},
         .n = x.size(1),
         .k = weight.size(1),
         .dy = left.data(),
         .rows = {.base = {right.data(), nullptr}, .dtype = right.dtype(), .width = right.size(1)},
         .dw = y.as<float>()},
        context.pool());
  }
  return rounded(std::move(y), out);
}

}  // namespace

Array grouped_matmul(const Context& context, ConstTensor x, ConstTensor weight, const GroupedMatmulOptions& options) {
  if (options.group_type != 0 && options.group_type != 2) {
    refuse("group_type is " + std::to_string(options.group_type) + ", should be 0 or 2");
  }
  require_range("group_list_type", options.group_list_type, 0, 1);
  require_axes("x", x, 2);
  if (x.dtype() != DType::int8) require_numbers("x", x);
  return options.group_type == 0 ? split_rows(context, x, weight, options) : split_sum(context, x, weight, options);
}

}  // namespace expar::ascend
