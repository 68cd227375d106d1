// Gated activations of tensors of any shape, by the kernels.
#include <expar/ascend/activation.h>

#include <cstring>
#include <string>

#include "src/ascend/groups.h"

namespace expar::ascend {
namespace {

/// An axis that is cut in two: `outer` times 2 `half` times `inner` elements.
struct Cut {
  Cut(const ConstTensor& x, std::int64_t dim) {
    require_numbers("x", x);
    const int rank = x.shape().rank();
    require_range("the axes of x", rank, 1, Shape::kMaxRank);
    require_range("dim", dim, -rank, rank - 1);
    const int axis = static_cast<int>(dim < 0 ? dim + rank : dim);
    if (x.size(axis) % 2 != 0) {
      refuse("x is " + shown(x) + ", whose axis " + std::to_string(axis) + " should be even");
    }
    half = x.size(axis) / 2;
    for (int i = 0; i < axis; ++i) outer *= x.size(i);
    for (int i = axis + 1; i < rank; ++i) inner *= x.size(i);
    std::int64_t e[Shape::kMaxRank] = {};
    for (int i = 0; i < rank; ++i) e[i] = i == axis ? half : x.size(i);
    halved = rank == 1   ? Shape{e[0]}
             : rank == 2 ? Shape{e[0], e[1]}
             : rank == 3 ? Shape{e[0], e[1], e[2]}
                         : Shape{e[0], e[1], e[2], e[3]};
  }

  std::int64_t outer = 1, half = 0, inner = 1;
  Shape halved;
};

/// The first `rows` rows of 2 `inner` elements, gate then up; the others are zeros. The kernels have no f16.
Array activated(const Context& context, const ActivationNumbers& numbers, const ConstTensor& x, std::int64_t rows,
                std::int64_t inner, const Shape& shape) {
  if (x.dtype() == DType::f16) {
    return converted(activated(context, numbers, converted(x, DType::f32), rows, inner, shape), DType::f16);
  }
  Array h(x.dtype(), shape);
  context.kernels().activate({.act = Activation::swiglu,
                              .numbers = numbers,
                              .rows = rows,
                              .inner = inner,
                              .dtype = x.dtype(),
                              .pre = x.data(),
                              .h = h.view().data()},
                             context.pool());
  return h;
}

/// x with the first of each pair along the axis before all the second ones.
Array parted(const ConstTensor& x, const Cut& cut) {
  Array out(x.dtype(), x.shape());
  const std::size_t bytes = at(cut.inner) * size_of(x.dtype());
  const std::byte* from = x.bytes();
  for (std::int64_t row = 0; row < cut.outer; ++row) {
    std::byte* const to = out.view().bytes() + at(row * 2 * cut.half) * bytes;
    for (std::int64_t i = 0; i < 2 * cut.half; ++i, from += bytes) {
      if (bytes > 0) std::memcpy(to + at(i % 2 * cut.half + i / 2) * bytes, from, bytes);
    }
  }
  return out;
}

}  // namespace

Array swiglu(const Context& context, ConstTensor x, std::int64_t dim) {
  const Cut cut(x, dim);
  return activated(context, {}, x, cut.outer, cut.half * cut.inner, cut.halved);
}

Array swiglu_grad(const Context& context, ConstTensor grad_output, ConstTensor x, std::int64_t dim) {
  const Cut cut(x, dim);
  require("grad_output", grad_output, x.dtype(), cut.halved);
  if (x.dtype() == DType::f16) {
    return converted(swiglu_grad(context, converted(grad_output, DType::f32), converted(x, DType::f32), dim),
                     DType::f16);
  }
  Array dx(x.dtype(), x.shape());
  context.kernels().activate_grad({.act = Activation::swiglu,
                                   .rows = cut.outer,
                                   .inner = cut.half * cut.inner,
                                   .dtype = x.dtype(),
                                   .pre = x.data(),
                                   .dh = grad_output.data(),
                                   .dpre = dx.view().data()},
                                  context.pool());
  return dx;
}

Array clipped_swiglu(const Context& context, ConstTensor x, const ClippedSwigluOptions& options) {
  const Cut cut(x, options.dim);
  if (!(options.limit > 0)) refuse("limit is " + std::to_string(options.limit) + ", should be above 0");
  const std::int64_t rows = group_offsets("group_index", options.group_index, 1, cut.outer).back();
  const ActivationNumbers numbers{.alpha = options.alpha, .limit = options.limit, .offset = options.bias};
  if (!options.interleaved) return activated(context, numbers, x, rows, cut.half * cut.inner, cut.halved);
  return activated(context, numbers, parted(x, cut), rows, cut.half * cut.inner, cut.halved);
}

}  // namespace expar::ascend
