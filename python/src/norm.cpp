// include/expar/norm.h
#include "python/src/norm.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <vector>

#include "python/src/bind.h"

namespace expar::python {
namespace {

using namespace nb::literals;
using Numbers = std::vector<std::int64_t>;

/// The library trusts these shapes; Python may not be trusted with memory.
void backward(const Context& c, const In& x_array, const In& gain_array, const In& scale_array, const In& dy_array,
              const In& residual_array, const Out& dx_array, const Out& dgain_array,
              const std::optional<Numbers>& given) {
  const ConstTensor x = read(x_array, "x"), gain = read(gain_array, "gain"), scale = read(scale_array, "scale"),
                    dy = read(dy_array, "dy"), residual = read(residual_array, "residual");
  const Tensor dx = written(dx_array, "dx"), dgain = written(dgain_array, "dgain");
  if (x.shape().rank() != 2 || (x.dtype() != DType::f32 && x.dtype() != DType::bf16)) {
    throw Error(ErrorCode::bad_argument,
                "x is " + std::string(name(x.dtype())) + " " + x.shape().str() + ", not [T, H] of f32 or bf16");
  }
  const std::int64_t tokens = x.size(0), hidden = x.size(1);
  const Numbers shards = shards_of(given, tokens);
  require("gain", gain, DType::f32, {hidden});
  require("scale", scale, DType::f32, {tokens});
  require("dy", dy, x.dtype(), x.shape());
  if (!residual.absent()) require("residual", residual, x.dtype(), x.shape());
  require("dx", dx, x.dtype(), x.shape());
  require("dgain", dgain, DType::f32, {static_cast<std::int64_t>(shards.size()) - 1, hidden});
  rms_norm_backward(c, x, gain, scale, dy, residual, shards, dx, dgain.as<float>(), hidden);
}

}  // namespace

void bind_norm(nb::module_& m) {
  nb::class_<NormArrays>(m, "RmsNorm", "What a norm of rows x [T, H] reads and writes beside them: arrays, kept alive.")
      .def(
          "__init__",
          [](NormArrays* self, const In& gain, const Out& y, const std::optional<Out>& scale, float epsilon) {
            new (self) NormArrays{gain, y, scale, epsilon};
          },
          "gain"_a, "y"_a, nb::kw_only(), "scale"_a = nb::none(), "epsilon"_a = RmsNorm().epsilon, R"(
gain  : [H] f32
y     : [T, H] of x's dtype, written; may be x
scale : [T] f32, written, for rms_norm_backward)");
  m.def(
      "rms_norm", [](const Context& c, const In& x, const NormArrays& norm) { rms_norm(c, read(x, "x"), norm.get()); },
      "context"_a, "x"_a, "norm"_a, Waits(), R"(
norm.y = (x * scale) * gain with scale = 1 / sqrt(mean(x^2) + epsilon), in f32.

x    : [T, H] f32 or bf16
norm : RmsNorm
A row's bytes do not depend on how many rows stand beside it. The norm after a combine costs less there:
``combine(..., norm=norm)``. Not collective. Raises BadArgument (shapes, dtypes, a negative epsilon).)");
  m.def("rms_norm_backward", &backward, "context"_a, "x"_a, "gain"_a, "scale"_a, "dy"_a, "residual"_a.none(), "dx"_a,
        "dgain"_a, nb::kw_only(), "shards"_a = nb::none(), Waits(), R"(
dx = residual + gradient of x; dgain [S, H] f32 of each shard, summed over its tokens in order.

x, gain, scale   : as rms_norm left them
dy, residual, dx : [T, H] of x's dtype; dx is written and may be the residual; a residual of None is zero
shards           : [S + 1] from 0 to T; None: one
Not collective. Raises BadArgument (shapes, dtypes, shards).)");
}

}  // namespace expar::python
