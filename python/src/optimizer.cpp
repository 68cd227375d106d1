// include/expar/optimizer.h
#include <expar/optimizer.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <vector>

#include "python/src/bind.h"
#include "python/src/tensor.h"

namespace expar::python {
namespace {

using namespace nb::literals;

/// None where there is nothing, or the shape of something that was not lent yet.
template <auto member>
std::optional<View> tensor(nb::handle self) {
  const Tensor& values = nb::cast<const Parameter&>(self).*member;
  const bool none = values.absent() || (values.data() == nullptr && values.elements() > 0);
  return none ? std::nullopt : std::optional(view(values, self));
}

struct Optimizer {
  AdamW adamw;

  explicit Optimizer(const AdamWOptions& options) : adamw(options) {}
  Optimizer(const Optimizer&) = delete;
};

/// Of whichever view there is.
const Tensor& any_view(const Parameter& p) { return p.value.absent() ? p.low : p.value; }

}  // namespace

void bind_optimizer(nb::module_& m) {
  nb::class_<Parameter>(m, "Parameter", nb::dynamic_attr(),
                        "A trained array: views of the layer's memory, or of what was lent to it.")
      .def_ro("name", &Parameter::name)
      .def_prop_ro("shape",
                   [](const Parameter& p) {
                     const Shape& shape = any_view(p).shape();
                     nb::list extents;
                     for (int axis = 0; axis < shape.rank(); ++axis) extents.append(shape[axis]);
                     return nb::typed<nb::tuple, int, nb::ellipsis>(nb::tuple(extents));
                   })
      .def_prop_ro("value", &tensor<&Parameter::value>, "f32, the master copy")
      .def_prop_ro("gradient", &tensor<&Parameter::gradient>, "f32")
      .def_prop_ro("low", &tensor<&Parameter::low>, "bf16 copy that the kernels read; None: they read value")
      .def_prop_ro(
          "has_low", [](const Parameter& p) { return !p.low.absent(); }, "whether the kernels read bf16")
      .def_rw("decay", &Parameter::decay);

  nb::class_<Optimizer>(m, "AdamW", R"(
AdamW on Parameters; their bf16 copies are refreshed in the same pass. Elementwise, so the same bits however parameters
are sharded.)")
      .def(
          "__init__",
          [](Optimizer* self, float beta1, float beta2, float eps, float decay) {
            new (self) Optimizer({.beta1 = beta1, .beta2 = beta2, .eps = eps, .decay = decay});
          },
          nb::kw_only(), "beta1"_a = AdamWOptions().beta1, "beta2"_a = AdamWOptions().beta2,
          "eps"_a = AdamWOptions().eps, "decay"_a = AdamWOptions().decay)
      .def(
          "step",
          [](Optimizer& a, const Context& c, const std::vector<Parameter>& parameters, float lr) {
            a.adamw.step(c, parameters, lr);
          },
          "context"_a, "parameters"_a, "lr"_a, Waits(),
          "One step over the same parameters in the same order every time. Not collective. Raises BadArgument, "
          "NoMemory.")
      .def_prop_ro("steps", [](const Optimizer& a) { return a.adamw.steps(); })
      .def(
          "go_on_from", [](Optimizer& a, std::int64_t steps) { a.adamw.go_on_from(steps); }, "steps"_a)
      .def(
          "moments",
          [](nb::handle self, const std::vector<Parameter>& parameters) {
            nb::typed<nb::list, nb::typed<nb::tuple, View, View>> all;
            for (const AdamWMoments& one : nb::cast<Optimizer&>(self).adamw.moments(parameters)) {
              all.append(nb::make_tuple(view(one.m, self), view(one.v, self)));
            }
            return all;
          },
          "parameters"_a, "Of each parameter (m, v), f32 views: what to save, and where to write what was saved.");
}

}  // namespace expar::python
