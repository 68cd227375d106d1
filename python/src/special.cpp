// include/expar/special.h
#include <expar/special.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <vector>

#include "python/src/bind.h"
#include "python/src/tensor.h"

namespace expar::python {
namespace {

using namespace nb::literals;
using Numbers = std::vector<std::int64_t>;

/// A pass, whose arrays are kept alive.
struct PassArrays {
  SpecialExperts experts;
  std::int64_t first = 0;
  In x, ids, weights, mix, value;

  SpecialPass get() const {
    return {.experts = experts,
            .first = first,
            .x = read(x, "x"),
            .ids = read(ids, "ids"),
            .weights = read(weights, "weights"),
            .mix = read(mix, "mix"),
            .value = read(value, "value")};
  }
};

void backward(const Context& c, const PassArrays& pass_arrays, const In& dout, const Out& dx, const Out& dweights,
              const std::optional<Out>& mix, const std::optional<Out>& value, const std::optional<Numbers>& given) {
  const SpecialPass pass = pass_arrays.get();
  const Numbers shards = shards_of(given, pass.x.shape().rank() > 0 ? pass.x.size(0) : 0);
  special_backward(c, pass, shards, read(dout, "dout"), written(dx, "dx"), written(dweights, "dweights"),
                   {.mix = mix ? written(*mix, "gradient of mix") : Tensor(),
                    .value = value ? written(*value, "gradient of value") : Tensor()});
}

}  // namespace

void bind_special(nb::module_& m) {
  nb::class_<SpecialExperts>(m, "SpecialExperts", R"(
How many experts there are that compute next to nothing, on the token's own rank: the last of a router's experts, in
this order. Of a token x, zero gives nothing, copy x, and constant a1 x + a2 v, where (a1, a2) = softmax(m1 . x, m2 . x).)")
      .def(
          "__init__",
          [](SpecialExperts* self, std::int64_t zero, std::int64_t copy, std::int64_t constant) {
            new (self) SpecialExperts{zero, copy, constant};
          },
          "zero"_a = 0, "copy"_a = 0, "constant"_a = 0)
      .def_ro("zero", &SpecialExperts::zero)
      .def_ro("copy", &SpecialExperts::copy)
      .def_ro("constant", &SpecialExperts::constant)
      .def_prop_ro("count", &SpecialExperts::count);
  nb::class_<PassArrays>(m, "SpecialPass", "Tokens at the special experts: views of arrays, kept alive.")
      .def(
          "__init__",
          [](PassArrays* self, const SpecialExperts& experts, std::int64_t first, const In& x, const In& ids,
             const In& weights, const In& mix,
             const In& value) { new (self) PassArrays{experts, first, x, ids, weights, mix, value}; },
          "experts"_a, "first"_a, "x"_a, "ids"_a, "weights"_a, "mix"_a = nb::none(), "value"_a = nb::none(), R"(
experts : SpecialExperts
first   : the id of the first of them; slots with ids below it are left to others
x       : [T, H] f32
ids     : [T, K] int32 below first + count; -1: no expert
weights : [T, K] f32
mix     : [constant, 2, H] f32, m1 and m2 of each, and value [constant, H] f32, v of each)");
  m.def(
      "add_special",
      [](const Context& c, const PassArrays& pass, const Out& out) { add_special(c, pass.get(), written(out, "out")); },
      "context"_a, "pass_"_a, "out"_a, Waits(), R"(
out[t] += weights[t, k] * y(t, k) of each slot of a special expert, in slot order.

pass_ : SpecialPass
out   : [T, H] f32, added to
Not collective. Raises BadArgument (shapes or dtypes; an id that is no expert).)");
  m.def("special_backward", &backward, "context"_a, "pass_"_a, "dout"_a, "dx"_a, "dweights"_a, "mix"_a = nb::none(),
        "value"_a = nb::none(), nb::kw_only(), "shards"_a = nb::none(), Waits(), R"(
The gradient of add_special.

dout     : [T, H] f32
dx       : [T, H] f32, added to
dweights : [T, K] f32, written at slots of special experts
mix      : [S, constant, 2, H] f32, and value [S, constant, H] f32, of each shard, written
shards   : [S + 1] from 0 to T; None: one
Not collective. Raises BadArgument (shapes or dtypes; an id that is no expert).)");
}

}  // namespace expar::python
