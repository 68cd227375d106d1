// include/expar/kernels.h: the grouped products, for experts that a framework differentiates.
#include <expar/kernels.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <expar/context.h>

#include <string>
#include <vector>

#include "python/src/bind.h"
#include "python/src/names.h"
#include "python/src/tensor.h"

namespace expar::python {
namespace {

using namespace nb::literals;
using Counts = std::vector<std::int64_t>;

[[noreturn]] void refuse(const std::string& why) { throw Error(ErrorCode::bad_argument, "grouped_mm: " + why); }

/// The rows, weights and groups of one product, checked.
struct Product {
  Product(const ConstTensor& rows, const ConstTensor& w, const Counts& counts, int row_axis) : offsets{0} {
    if (w.shape().rank() != 3) refuse("w is " + w.shape().str() + ", should be [L, N, K]");
    if (w.dtype() != DType::f32 && w.dtype() != DType::bf16) {
      refuse("w is " + std::string(name(w.dtype())) + ", neither f32 nor bf16");
    }
    for (const std::int64_t count : counts) {
      if (count < 0) refuse("a group has " + std::to_string(count) + " rows");
      offsets.push_back(offsets.back() + count);
    }
    n = w.size(1);
    k = w.size(2);
    if (static_cast<std::int64_t>(counts.size()) != w.size(0)) {
      refuse(std::to_string(counts.size()) + " counts for the " + std::to_string(w.size(0)) + " groups of w");
    }
    require("grouped_mm: x", rows, w.dtype(), {offsets.back(), w.size(row_axis)});
  }
  std::int64_t rows() const { return offsets.back(); }
  /// One of the three products; it reads the offsets here.
  template <class Gemm>
  Gemm gemm() const {
    Gemm gemm;
    gemm.groups = {static_cast<int>(offsets.size()) - 1, offsets.data()};
    gemm.n = n;
    gemm.k = k;
    return gemm;
  }

  Counts offsets;
  std::int64_t n = 0, k = 0;
};

void forward(const Context& c, const In& x_array, const In& w_array, const Counts& counts, const Out& y_array) {
  const ConstTensor x = read(x_array, "x"), w = read(w_array, "w");
  const Tensor y = written(y_array, "y");
  const Product product(x, w, counts, 2);
  require("grouped_mm: y", y, w.dtype(), {product.rows(), product.n});
  auto gemm = product.gemm<GemmNT>();
  gemm.rows = {.base = {x.data(), nullptr}, .dtype = x.dtype(), .width = product.k};
  gemm.w = {w.data(), w.dtype(), false};
  gemm.y = y.data();
  gemm.y_dtype = y.dtype();
  c.kernels().gemm_nt(gemm, c.pool());
}

void to_rows(const Context& c, const In& dy_array, const In& w_array, const Counts& counts, const Out& dx_array) {
  const ConstTensor dy = read(dy_array, "dy"), w = read(w_array, "w");
  const Tensor dx = written(dx_array, "dx");
  const Product product(dy, w, counts, 1);
  require("grouped_mm: dx", dx, w.dtype(), {product.rows(), product.k});
  auto gemm = product.gemm<GemmNN>();
  gemm.dy = dy.data();
  gemm.w = {w.data(), w.dtype(), false};
  gemm.dx = dx.data();
  gemm.dx_dtype = dx.dtype();
  c.kernels().gemm_nn(gemm, c.pool());
}

void to_weights(const Context& c, const In& dy_array, const In& x_array, const Counts& counts, const Out& dw_array) {
  const ConstTensor dy = read(dy_array, "dy"), x = read(x_array, "x");
  const Tensor dw = written(dw_array, "dw");
  const Product product(x, ConstTensor(dw.data(), x.dtype(), dw.shape()), counts, 2);
  require("grouped_mm: dy", dy, x.dtype(), {product.rows(), product.n});
  require("grouped_mm: dw", dw, DType::f32, dw.shape());
  auto gemm = product.gemm<GemmTN>();
  gemm.dy = dy.data();
  gemm.rows = {.base = {x.data(), nullptr}, .dtype = x.dtype(), .width = product.k};
  gemm.dw = dw.as<float>();
  c.kernels().gemm_tn(gemm, c.pool());
}

/// Rows of an activation: their number R and the width F of its results, checked.
template <class Pass>
Pass activation(const char* what, const std::string& name_of_it, const ConstTensor& pre, const ConstTensor& h) {
  const NamedActivation& named_one = named(kActivations, "activation", name_of_it);
  Pass pass;
  pass.act = named_one.activation;
  pass.numbers = named_one.numbers;
  if (pre.dtype() != DType::f32 && pre.dtype() != DType::bf16) {
    throw Error(ErrorCode::bad_argument,
                "activate: pre is " + std::string(name(pre.dtype())) + ", neither f32 nor bf16");
  }
  const std::int64_t joined = gated(pass.act) ? 2 : 1;
  if (pre.shape().rank() != 2 || pre.size(1) % joined != 0 || h.dtype() != pre.dtype() ||
      h.shape() != Shape{pre.size(0), pre.size(1) / joined}) {
    throw Error(ErrorCode::bad_argument, "activate: pre is " + pre.shape().str() + " and " + what + " is " +
                                             h.shape().str() + ", should be [R, " + (joined == 2 ? "2F" : "F") +
                                             "] and [R, F] of one dtype");
  }
  pass.rows = pre.size(0);
  pass.inner = h.size(1);
  pass.dtype = pre.dtype();
  pass.pre = pre.data();
  return pass;
}

void activate(const Context& c, const In& pre, const std::string& name_of_it, const Out& h_array) {
  const Tensor h = written(h_array, "h");
  auto pass = activation<Activate>("h", name_of_it, read(pre, "pre"), h);
  pass.h = h.data();
  c.kernels().activate(pass, c.pool());
}

void activate_grad(const Context& c, const In& pre_array, const In& dh_array, const std::string& name_of_it,
                   const Out& dpre_array) {
  const ConstTensor pre = read(pre_array, "pre"), dh = read(dh_array, "dh");
  const Tensor dpre = written(dpre_array, "dpre");
  auto pass = activation<ActivateGrad>("dh", name_of_it, pre, dh);
  if (dpre.shape() != pre.shape() || dpre.dtype() != pre.dtype()) {
    throw Error(ErrorCode::bad_argument,
                "activate: dpre is " + dpre.shape().str() + ", should be as pre, " + pre.shape().str());
  }
  pass.dh = dh.data();
  pass.dpre = dpre.data();
  c.kernels().activate_grad(pass, c.pool());
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def("grouped_mm", &forward, "context"_a, "x"_a, "w"_a, "counts"_a, "y"_a, Waits(), R"(
y[i, n] = sum_k x[i, k] w[g(i), n, k], where the rows of x stand group by group, ``counts[g]`` of each.

x : [R, K] · w : [L, N, K], both f32 or both bf16 · counts : [L] · y : [R, N] of w's dtype, written
An element's bytes depend on its row and its weights alone. Not collective. Raises BadArgument (shapes or dtypes).)");
  m.def("grouped_mm_to_rows", &to_rows, "context"_a, "dy"_a, "w"_a, "counts"_a, "dx"_a, Waits(),
        "The gradient of grouped_mm's x: dx [R, K] from dy [R, N] and w [L, N, K].");
  m.def("grouped_mm_to_weights", &to_weights, "context"_a, "dy"_a, "x"_a, "counts"_a, "dw"_a, Waits(), R"(
The gradient of grouped_mm's w: dw [L, N, K] f32 from dy [R, N] and x [R, K], summed over a group's rows in order.)");
  m.def("activate", &activate, "context"_a, "pre"_a, "activation"_a, "h"_a, Waits(), R"(
h = act(pre), computed in f32, rounded once.

pre        : [R, 2F] gate then up, or [R, F]; f32 or bf16
activation : as MoeLayer has them
h          : [R, F], written
Not collective. Raises BadArgument (another name, shape or dtype).)");
  m.def("activate_grad", &activate_grad, "context"_a, "pre"_a, "dh"_a, "activation"_a, "dpre"_a, Waits(),
        "The gradient of activate's pre: dpre, of its shape, from dh [R, F].");
}

}  // namespace expar::python
