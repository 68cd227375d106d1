// include/expar/experts.h
#include "python/src/experts.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <utility>

#include "python/src/bind.h"

namespace expar::python {
namespace {

using namespace nb::literals;

/// Written by backward.
struct GradientArrays {
  Out up, down;
  std::optional<Out> up_bias, down_bias;

  ExpertGradients get() const {
    return {.up = written(up, "gradients.up"),
            .down = written(down, "gradients.down"),
            .up_bias = up_bias ? written(*up_bias, "gradients.up_bias") : Tensor(),
            .down_bias = down_bias ? written(*down_bias, "gradients.down_bias") : Tensor()};
  }
};

void bind_shape(nb::module_& m) {
  nb::class_<ExpertShape>(m, "ExpertShape", R"(
L local experts: y = down(act(up x + up_bias)) + down_bias. Gated: up [L, 2F, H] holds gate then up; plain: [L, F, H].
down [L, H, F].)")
      .def(
          "__init__",
          [](ExpertShape* self, std::int64_t hidden, std::int64_t inner, const std::string& activation,
             const ActivationSettings& numbers, bool bias, const std::string& weights_on, const std::string& dtype) {
            const NamedActivation act = activation_of(activation, numbers);
            const ExpertShape shape{.hidden = hidden,
                                    .inner = inner,
                                    .activation = act.activation,
                                    .numbers = act.numbers,
                                    .bias = bias,
                                    .weights_on = named(kWeightsOn, "weights_on", weights_on).value,
                                    .dtype = parse_dtype(dtype)};
            validate(shape);
            new (self) ExpertShape(shape);
          },
          "hidden"_a, "inner"_a, nb::kw_only(), "activation"_a = "swiglu", "numbers"_a = ActivationSettings(),
          "bias"_a = false, "weights_on"_a = "output", "dtype"_a = "f32", R"(
hidden, inner : H, F
activation    : "swiglu", "clamped_swiglu", "quick_geglu", "geglu", "gelu", "silu", "relu2"
numbers       : alpha, limit, offset of its formula, where they differ
bias          : experts have biases
weights_on    : "output" (combine multiplies by the router's weights), "inner" or "input" (combine unweighted)
dtype         : of weights, rows and results, "f32" or "bf16"
Raises BadArgument, naming the value that cannot be.)")
      .def_ro("hidden", &ExpertShape::hidden)
      .def_ro("inner", &ExpertShape::inner)
      .def_ro("bias", &ExpertShape::bias)
      .def_prop_ro("weights_on", [](const ExpertShape& s) { return name_of(kWeightsOn, s.weights_on); })
      .def_prop_ro("dtype", [](const ExpertShape& s) { return std::string(name(s.dtype)); })
      .def_prop_ro("up_rows", &ExpertShape::up_rows, "2F where the activation is gated, else F");
}

void bind_arrays(nb::module_& m) {
  nb::class_<ExpertArrays>(m, "ExpertWeights", "The weights of this rank's experts: views of arrays, kept alive.")
      .def(
          "__init__",
          [](ExpertArrays* self, const In& up, const In& down, const In& up_bias, const In& down_bias) {
            new (self) ExpertArrays{up, down, up_bias, down_bias};
          },
          "up"_a, "down"_a, "up_bias"_a = nb::none(), "down_bias"_a = nb::none(), R"(
up        : [L, 2F, H] where the activation is gated (gate then up), else [L, F, H]; f32 or bf16
down      : [L, H, F], likewise
up_bias   : [L, 2F] or [L, F] f32, and down_bias [L, H] f32, where the shape has biases)");
  nb::class_<GradientArrays>(m, "ExpertGradients", "Arrays that experts_backward writes, kept alive.")
      .def(
          "__init__",
          [](GradientArrays* self, const Out& up, const Out& down, const std::optional<Out>& up_bias,
             const std::optional<Out>& down_bias) {
            new (self) GradientArrays{up, down, up_bias, down_bias};
          },
          "up"_a, "down"_a, "up_bias"_a = nb::none(), "down_bias"_a = nb::none(), "f32, in the shapes of the weights.");
  nb::class_<ExpertsRecord>(m, "ExpertsRecord", R"(
What experts_forward leaves for experts_backward. Reuse one object per layer: it keeps its memory.)")
      .def(nb::init<>());
  nb::class_<ExpertsScratch>(m, "ExpertsScratch", "What experts_backward works in. Reuse one object.")
      .def(nb::init<>());
}

}  // namespace

NamedActivation activation_of(const std::string& name, const nb::dict& numbers) {
  NamedActivation all = named(kActivations, "activation", name);
  for (const auto& [key, value] : numbers) {
    constexpr Named<float ActivationNumbers::*> kNumbers[] = {{"alpha", &ActivationNumbers::alpha},
                                                              {"limit", &ActivationNumbers::limit},
                                                              {"offset", &ActivationNumbers::offset}};
    const std::string number = nb::cast<std::string>(key);
    all.numbers.*named(kNumbers, "a number of the activation", number).value = nb::cast<float>(value);
  }
  return all;
}

ExpertWeights ExpertArrays::of(const ExpertShape& shape, std::int64_t experts) const {
  validate(shape);
  const ConstTensor up_tensor = read(up, "up"), down_tensor = read(down, "down");
  require("up", up_tensor, shape.dtype, {experts, shape.up_rows(), shape.hidden});
  require("down", down_tensor, shape.dtype, {experts, shape.hidden, shape.inner});
  return {.up = {up_tensor.data(), shape.dtype},
          .down = {down_tensor.data(), shape.dtype},
          .up_bias = read(up_bias, "up_bias"),
          .down_bias = read(down_bias, "down_bias")};
}

void bind_experts(nb::module_& m) {
  bind_shape(m);
  bind_arrays(m);
  m.def(
      "experts_forward",
      [](const Context& c, const ExpertShape& shape, const ExpertArrays& weights, const Inbox& inbox, Outbox& y,
         ExpertsRecord& record) {
        experts_forward(c, shape, weights.of(shape, inbox.plan().local().count), inbox, y, record);
      },
      "context"_a, "shape"_a, "weights"_a, "inbox"_a, "y"_a, "record"_a, Waits(), R"(
y[i] = expert(row i) for the R rows of the inbox.

shape   : ExpertShape
weights : ExpertWeights of this rank's L experts
y       : Outbox [R, H] of make_outbox(context, inbox, H, dtype), written
record  : ExpertsRecord, written
Not collective. Raises BadArgument (weights, inbox or y disagree with the shape; a plan with an alignment above 1; y is
rank_major), NoMemory. Cost: each weight is read once per block of rows; rows are gathered by list, not copied.)");
  m.def(
      "experts_backward",
      [](const Context& c, const ExpertShape& shape, const ExpertArrays& weights, const Inbox& inbox, const Inbox& dout,
         const Outbox& y, const ExpertsRecord& record, const GradientArrays& gradients, Outbox* dx, Outbox& dweights,
         ExpertsScratch& scratch) {
        experts_backward(c, shape, weights.of(shape, inbox.plan().local().count), inbox, dout, y, record,
                         gradients.get(), dx, dweights, scratch);
      },
      "context"_a, "shape"_a, "weights"_a, "inbox"_a, "dout"_a, "y"_a, "record"_a, "gradients"_a, "dx"_a.none(),
      "dweights"_a, "scratch"_a, Waits(), R"(
The gradient of experts_forward, weighted by the router.

dout      : Inbox: the gradient of the output, dispatched with the same plan (``lists_of=inbox``)
y, record : what forward wrote
gradients : ExpertGradients, overwritten
dx        : Outbox [R, H] of gradients of the rows, written; to be combined unweighted. None: no rank asks for it
dweights  : Outbox [R, 1] f32, the gradient of each row's weight, written; for fetch_slots
scratch   : ExpertsScratch
Not collective. Raises BadArgument (as forward; gradients, record, dx or dweights disagree with the shape; dout came by
another plan), NoMemory. Cost: two products for each of forward's.)");
}

}  // namespace expar::python
