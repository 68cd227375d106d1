// include/expar/ascend/activation.h
#include <nanobind/stl/pair.h>

#include "python/src/ascend/ascend.h"

namespace expar::python {
namespace {

auto given(ascend::QuantisedRows rows) {
  return std::pair(python::given(std::move(rows.y)), python::given(std::move(rows.scale)));
}

void bind_swiglu(nb::module_& m) {
  m.def(
      "_ascend_swiglu",
      [](const Context& c, const In& x, std::int64_t dim) {
        return python::given(released([&] { return ascend::swiglu(c, read(x, "x"), dim); }));
      },
      "context"_a, "x"_a, "dim"_a, "silu(a) * b of the halves of an axis.");
  m.def(
      "_ascend_swiglu_grad",
      [](const Context& c, const In& grad_output, const In& x, std::int64_t dim) {
        return python::given(
            released([&] { return ascend::swiglu_grad(c, read(grad_output, "grad_output"), read(x, "x"), dim); }));
      },
      "context"_a, "grad_output"_a, "x"_a, "dim"_a, "The gradient of x.");
  m.def(
      "_ascend_clipped_swiglu",
      [](const Context& c, const In& x, const In& group_index, std::int64_t dim, float alpha, float limit, float bias,
         bool interleaved) {
        return python::given(released([&] {
          return ascend::clipped_swiglu(c, read(x, "x"),
                                        {.group_index = read(group_index, "group_index"),
                                         .dim = dim,
                                         .alpha = alpha,
                                         .limit = limit,
                                         .bias = bias,
                                         .interleaved = interleaved});
        }));
      },
      "context"_a, "x"_a, nb::kw_only(), "group_index"_a.none(), "dim"_a, "alpha"_a, "limit"_a, "bias"_a,
      "interleaved"_a, "The gated activation of GPT-OSS.");
}

void bind_quantised(nb::module_& m) {
  m.def(
      "_ascend_swiglu_quant",
      [](const Context& c, const In& x, const In& smooth_scales, const In& offsets, const In& group_index,
         bool activate_left, std::int64_t quant_mode, std::int64_t group_list_type) {
        return given(released([&] {
          return ascend::swiglu_quant(c, read(x, "x"),
                                      {.smooth_scales = read(smooth_scales, "smooth_scales"),
                                       .offsets = read(offsets, "offsets"),
                                       .group_index = read(group_index, "group_index"),
                                       .activate_left = activate_left,
                                       .quant_mode = quant_mode,
                                       .group_list_type = group_list_type});
        }));
      },
      "context"_a, "x"_a, nb::kw_only(), "smooth_scales"_a.none(), "offsets"_a.none(), "group_index"_a.none(),
      "activate_left"_a, "quant_mode"_a, "group_list_type"_a, "y and, with quant_mode 1, scale.");
  m.def(
      "_ascend_dequant_swiglu_quant",
      [](const Context& c, const In& x, const In& weight_scale, const In& activation_scale, const In& bias,
         const In& quant_scale, const In& quant_offset, const In& group_index, bool activate_left,
         std::int64_t quant_mode) {
        return given(released([&] {
          return ascend::dequant_swiglu_quant(c, read(x, "x"),
                                              {.weight_scale = read(weight_scale, "weight_scale"),
                                               .activation_scale = read(activation_scale, "activation_scale"),
                                               .bias = read(bias, "bias"),
                                               .quant_scale = read(quant_scale, "quant_scale"),
                                               .quant_offset = read(quant_offset, "quant_offset"),
                                               .group_index = read(group_index, "group_index"),
                                               .activate_left = activate_left,
                                               .quant_mode = quant_mode});
        }));
      },
      "context"_a, "x"_a, nb::kw_only(), "weight_scale"_a.none(), "activation_scale"_a.none(), "bias"_a.none(),
      "quant_scale"_a.none(), "quant_offset"_a.none(), "group_index"_a.none(), "activate_left"_a, "quant_mode"_a,
      "y and, with quant_mode 1, scale.");
}

}  // namespace

void bind_ascend_activation(nb::module_& m) {
  bind_swiglu(m);
  bind_quantised(m);
}

}  // namespace expar::python
