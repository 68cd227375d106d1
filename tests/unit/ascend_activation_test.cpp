// Gated activations against their formulas in double precision, and their int8 within half a step.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <expar/ascend/activation.h>

#include "tests/error_of.h"
#include "tests/unit/ascend_testing.h"

namespace expar::ascend {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }

/// How far a product of factors around `size` may be off.
double tolerance(DType dtype, double size) { return (std::abs(size) + 1) * 2 * relative(dtype); }

/// Where the halves of an axis lie: for element i of the half tensor the places in x.
struct Places {
  std::int64_t a, b;
};
Places places(const Shape& shape, int axis, bool interleaved, std::int64_t i) {
  std::int64_t inner = 1;
  for (int j = axis + 1; j < shape.rank(); ++j) inner *= shape[j];
  const std::int64_t half = shape[axis] / 2, outer = i / (half * inner), along = i / inner % half, in = i % inner;
  const std::int64_t base = outer * 2 * half;
  return interleaved ? Places{(base + 2 * along) * inner + in, (base + 2 * along + 1) * inner + in}
                     : Places{(base + along) * inner + in, (base + half + along) * inner + in};
}

struct Axis {
  Shape shape, halved;
  std::int64_t dim;
};
const std::vector<Axis>& axes() {
  static const std::vector<Axis> all = {{{6}, {3}, 0},
                                        {{5, 8}, {5, 4}, -1},
                                        {{6, 5}, {3, 5}, 0},
                                        {{3, 4, 7}, {3, 2, 7}, 1},
                                        {{2, 3, 4, 5}, {2, 3, 2, 5}, -2},
                                        {{0, 4}, {0, 2}, 1}};
  return all;
}

TEST(AscendActivation, multiplies_the_silu_of_one_half_by_the_other_and_goes_back) {
  on_one_rank([](const Context& context) {
    Draw draw(1);
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const Axis& axis : axes()) {
        const Array x = draw.reals(dtype, axis.shape), dout = draw.reals(dtype, axis.halved);
        const Array out = swiglu(context, x, axis.dim), dx = swiglu_grad(context, dout, x, axis.dim);
        ASSERT_EQ(out.view().shape(), axis.halved);
        ASSERT_EQ(out.view().dtype(), dtype);
        const int dim = static_cast<int>(axis.dim < 0 ? axis.dim + axis.shape.rank() : axis.dim);
        for (std::int64_t i = 0; i < axis.halved.elements(); ++i) {
          const Places at = places(axis.shape, dim, false, i);
          const double a = double{number(x, at.a)}, b = double{number(x, at.b)}, g = double{number(dout, i)};
          EXPECT_NEAR(double{number(out, i)}, silu(a) * b, tolerance(dtype, silu(a) * b));
          const double da = g * b * sigmoid(a) * (1 + a * (1 - sigmoid(a)));
          EXPECT_NEAR(double{number(dx, at.a)}, da, tolerance(dtype, da));
          EXPECT_NEAR(double{number(dx, at.b)}, g * silu(a), tolerance(dtype, g * silu(a)));
        }
      }
    }
  });
}

TEST(AscendActivation, clips_what_it_multiplies) {
  on_one_rank([](const Context& context) {
    Draw draw(2);
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const Axis& axis : axes()) {
        for (const bool interleaved : {true, false}) {
          const Array x = draw.reals(dtype, axis.shape);
          const ClippedSwigluOptions options{.dim = axis.dim, .limit = 0.75F, .bias = 0.5F, .interleaved = interleaved};
          const Array out = clipped_swiglu(context, x, options);
          const int dim = static_cast<int>(axis.dim < 0 ? axis.dim + axis.shape.rank() : axis.dim);
          for (std::int64_t i = 0; i < axis.halved.elements(); ++i) {
            const Places at = places(axis.shape, dim, interleaved, i);
            const double a = std::min(double{number(x, at.a)}, 0.75);
            const double b = std::clamp(double{number(x, at.b)}, -0.75, 0.75);
            const double wanted = a * sigmoid(double{1.702F} * a) * (b + 0.5);
            EXPECT_NEAR(double{number(out, i)}, wanted, tolerance(dtype, wanted));
          }
        }
      }
    }
    const Array x = draw.reals(DType::f32, {4, 6});
    const std::vector<std::int64_t> counts{1, 0, 2};
    const Array all = clipped_swiglu(context, x),
                some = clipped_swiglu(context, x, {.group_index = {counts.data(), {3}}});
    for (std::int64_t i = 0; i < 12; ++i) EXPECT_EQ(number(some, i), i < 9 ? number(all, i) : 0);
  });
}

/// Checks rows of int8 against what should have been rounded.
void check_rows(const QuantisedRows& got, std::int64_t quant_mode, std::int64_t rows,
                const std::function<double(std::int64_t row, std::int64_t column)>& value) {
  const std::int64_t width = got.y.view().size(1);
  EXPECT_EQ(static_cast<bool>(got.scale), quant_mode == 1);
  for (std::int64_t i = 0; i < got.y.view().size(0); ++i) {
    double most = 0;
    for (std::int64_t h = 0; h < width && i < rows; ++h) most = std::max(most, std::abs(value(i, h)));
    const double scale = quant_mode == 0 ? 1 : most / 127;
    if (quant_mode == 1) {
      EXPECT_NEAR(double{number(got.scale, i)}, scale, scale * 1e-5);
    }
    for (std::int64_t h = 0; h < width; ++h) {
      const double q = got.y.as<std::int8_t>()[i * width + h];
      if (i >= rows || scale == 0) {
        EXPECT_EQ(q, 0);
      } else {
        EXPECT_LE(std::abs(q - std::clamp(value(i, h) / scale, -128.0, 127.0)), 0.501) << i << " " << h;
      }
    }
  }
}

/// Groups of rows at random, of which some may be beyond all.
struct Groups {
  explicit Groups(Draw& draw) {
    for (std::int64_t g = draw.number(1, 4); g > 0; --g) counts.push_back(draw.number(0, 5));
    for (const std::int64_t count : counts) sums.push_back(total += count);
    rows = total + draw.number(0, 2);
  }
  std::int64_t of(std::int64_t row) const { return std::upper_bound(sums.begin(), sums.end(), row) - sums.begin(); }
  std::int64_t size() const { return static_cast<std::int64_t>(counts.size()); }

  std::vector<std::int64_t> counts, sums;
  std::int64_t total = 0, rows = 0;
};

TEST(AscendActivation, quantises_what_it_activates) {
  on_one_rank([](const Context& context) {
    Draw draw(3);
    for (int round = 0; round < 100; ++round) {
      const Groups groups(draw);
      const std::int64_t h = draw.number(1, 40), form = draw.number(0, 3);
      SwigluQuantOptions options{.activate_left = draw.number(0, 1) == 1,
                                 .quant_mode = draw.number(0, 1),
                                 .group_list_type = draw.number(0, 1)};
      const bool is_grouped = form < 2;
      const std::vector<std::int64_t>& list = options.group_list_type == 0 ? groups.sums : groups.counts;
      if (is_grouped) options.group_index = {list.data(), {groups.size()}};
      const Shape shapes[] = {{groups.size(), h}, {groups.size()}, {h}, {1, h}};
      const Array x = draw.reals(draw.dtype(), {groups.rows, 2 * h});
      const Array smooth = draw.reals(DType::f32, shapes[form]), offsets = draw.reals(DType::f32, shapes[form]);
      for (std::int64_t i = 0; i < smooth.view().elements(); ++i) smooth.as<float>()[i] *= 20;
      const bool is_smooth = options.quant_mode == 0 || draw.number(0, 1) == 1;
      const bool is_moved = options.quant_mode == 0 && draw.number(0, 1) == 1;
      if (is_smooth) options.smooth_scales = smooth;
      if (is_moved) options.offsets = offsets;
      check_rows(swiglu_quant(context, x, options), options.quant_mode, is_grouped ? groups.total : groups.rows,
                 [&](std::int64_t row, std::int64_t column) {
                   const double left = double{number(x, row * 2 * h + column)};
                   const double right = double{number(x, row * 2 * h + h + column)};
                   const double value = options.activate_left ? silu(left) * right : silu(right) * left;
                   const std::int64_t i = form == 0 ? groups.of(row) * h + column : form == 1 ? groups.of(row) : column;
                   return value * (is_smooth ? double{number(smooth, i)} : 1) +
                          (is_moved ? double{number(offsets, i)} : 0);
                 });
    }
  });
}

TEST(AscendActivation, makes_numbers_of_integer_sums_first) {
  on_one_rank([](const Context& context) {
    Draw draw(4);
    for (int round = 0; round < 100; ++round) {
      const Groups groups(draw);
      const std::int64_t h = draw.number(1, 40), width = 2 * h;
      const bool is_grouped = draw.number(0, 1) == 1, is_column = draw.number(0, 1) == 1,
                 is_whole = draw.number(0, 1) == 1;
      const Array x = draw.integers(DType::int32, {groups.rows, width}, -3000, 3000);
      const auto of_columns = [&](std::int64_t count) {
        return is_grouped ? Shape{groups.size(), count} : Shape{count};
      };
      const Array weight = draw.reals(DType::f32, of_columns(width)), quant = draw.reals(DType::f32, of_columns(h));
      for (std::int64_t i = 0; i < weight.view().elements(); ++i) weight.as<float>()[i] *= 0.001F;
      const Array activation = draw.reals(DType::f32, is_column ? Shape{groups.rows, 1} : Shape{groups.rows});
      const Array whole = draw.integers(DType::int32, of_columns(width), -900, 900);
      const Array plain = draw.reals(DType::f32, of_columns(width));
      const bool is_scaled = draw.number(0, 1) == 1, is_biased = draw.number(0, 2) > 0;
      DequantSwigluQuantOptions options{.weight_scale = weight,
                                        .quant_scale = quant,
                                        .activate_left = draw.number(0, 1) == 1,
                                        .quant_mode = draw.number(0, 1)};
      if (is_scaled) options.activation_scale = activation;
      if (is_biased) options.bias = is_whole ? whole : plain;
      if (is_grouped) options.group_index = {groups.counts.data(), {groups.size()}};
      check_rows(dequant_swiglu_quant(context, x, options), options.quant_mode, is_grouped ? groups.total : groups.rows,
                 [&](std::int64_t row, std::int64_t column) {
                   const std::int64_t group = is_grouped ? groups.of(row) : 0;
                   const auto value = [&](std::int64_t j) {
                     const std::int64_t own = group * width + j;
                     double sum = static_cast<double>(integer(x, row * width + j));
                     if (is_biased && is_whole) sum += static_cast<double>(integer(whole, own));
                     sum *= double{number(weight, own)} * (is_scaled ? double{number(activation, row)} : 1);
                     return sum + (is_biased && !is_whole ? double{number(plain, own)} : 0);
                   };
                   const double left = value(column), right = value(h + column);
                   return (options.activate_left ? silu(left) * right : silu(right) * left) *
                          double{number(quant, group * h + column)};
                 });
    }
    const Array x = draw.reals(DType::bf16, {3, 8});
    const QuantisedRows plain = swiglu_quant(context, x, {.quant_mode = 1});
    const QuantisedRows same = dequant_swiglu_quant(context, x, {.quant_mode = 1});
    for (std::int64_t i = 0; i < 12; ++i) EXPECT_EQ(plain.y.as<std::int8_t>()[i], same.y.as<std::int8_t>()[i]);
  });
}

TEST(AscendActivation, refuses_what_does_not_fit) {
  on_one_rank([](const Context& context) {
    const Array x(DType::f32, {4, 6}), odd(DType::f32, {4, 5}), whole(DType::int32, {4, 6}), h(DType::f32, {3});
    const Array wide(DType::f32, {6}), matrix(DType::f32, {2, 3}), bytes(DType::int8, {4, 6});
    const std::vector<std::int64_t> many{3, 2}, negative{1, -1}, falling{2, 1}, good{2, 2};
    const auto list = [](const std::vector<std::int64_t>& v) { return ConstTensor(v.data(), {2}); };
    const auto refusal = [](const std::function<void()>& call) { return test::refusal_of(call); };
    EXPECT_EQ(refusal([&] { swiglu(context, odd); }), "x is f32 [4, 5], whose axis 1 should be even");
    EXPECT_EQ(refusal([&] { swiglu(context, x, 2); }), "dim is 2, should be from -2 to 1");
    EXPECT_EQ(refusal([&] { swiglu(context, bytes); }), "x is int8 [4, 6], should be f32, bf16 or f16");
    EXPECT_EQ(refusal([&] { swiglu_grad(context, x, x); }), "grad_output is f32 [4, 6], should be f32 [4, 3]");
    EXPECT_EQ(refusal([&] { clipped_swiglu(context, x, {.limit = 0}); }), "limit is 0.000000, should be above 0");
    EXPECT_EQ(refusal([&] { clipped_swiglu(context, x, {.group_index = list(many)}); }),
              "group_index[1] is 2, should be from 0 to 1");
    EXPECT_EQ(refusal([&] { clipped_swiglu(context, x, {.group_index = h}); }),
              "group_index is f32 [3], should be int64 [3]");
    const auto quant = [&](const SwigluQuantOptions& options) {
      return refusal([&] { swiglu_quant(context, x, options); });
    };
    EXPECT_EQ(quant({}), "smooth_scales is missing, which quant_mode 0 needs");
    EXPECT_EQ(quant({.quant_mode = 2}), "quant_mode is 2, should be from 0 to 1");
    EXPECT_EQ(quant({.smooth_scales = wide}), "smooth_scales is f32 [6], should be f32 [3]");
    EXPECT_EQ(quant({.smooth_scales = h, .group_index = list(good)}), "smooth_scales is f32 [3], should be f32 [2]");
    EXPECT_EQ(quant({.smooth_scales = x, .group_index = list(good)}),
              "smooth_scales is f32 [4, 6], should be f32 [2, 3]");
    EXPECT_EQ(quant({.smooth_scales = h, .offsets = wide}), "offsets is f32 [6], should be f32 [3]");
    EXPECT_EQ(quant({.offsets = h, .quant_mode = 1}), "offsets is given with quant_mode 1, which takes none");
    EXPECT_EQ(quant({.quant_mode = 1, .group_list_type = 2}), "group_list_type is 2, should be from 0 to 1");
    EXPECT_EQ(quant({.group_index = list(falling), .quant_mode = 1}), "group_index[1] is 1, should be from 2 to 4");
    EXPECT_EQ(quant({.group_index = list(negative), .quant_mode = 1, .group_list_type = 1}),
              "group_index[1] is -1, should be from 0 to 3");
    const auto dequant = [&](const Array& rows, const DequantSwigluQuantOptions& options) {
      return refusal([&] { dequant_swiglu_quant(context, rows, options); });
    };
    EXPECT_EQ(dequant(whole, {.quant_mode = 1}), "weight_scale is missing, which x of int32 needs");
    EXPECT_EQ(dequant(x, {.weight_scale = wide, .quant_mode = 1}), "weight_scale is given with x of f32");
    EXPECT_EQ(dequant(x, {.activation_scale = wide, .quant_mode = 1}), "activation_scale is given with x of f32");
    EXPECT_EQ(dequant(x, {.bias = wide, .quant_mode = 1}), "bias is given with x of f32");
    EXPECT_EQ(dequant(whole, {.weight_scale = h, .quant_mode = 1}), "weight_scale is f32 [3], should be f32 [6]");
    EXPECT_EQ(dequant(whole, {.weight_scale = wide, .group_index = list(good), .quant_mode = 1}),
              "weight_scale is f32 [6], should be f32 [2, 6]");
    EXPECT_EQ(dequant(whole, {.weight_scale = wide, .activation_scale = h, .quant_mode = 1}),
              "activation_scale is f32 [3], should be f32 [4]");
    EXPECT_EQ(dequant(whole, {.weight_scale = wide, .bias = h, .quant_mode = 1}), "bias is f32 [3], should be f32 [6]");
    EXPECT_EQ(dequant(whole, {.weight_scale = wide}), "quant_scale is missing, which quant_mode 0 needs");
    EXPECT_EQ(dequant(odd, {.quant_mode = 1}), "x is f32 [4, 5], whose axis 1 should be even");
  });
}

}  // namespace
}  // namespace expar::ascend
