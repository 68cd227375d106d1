// Experts in slices of their inner dimension: agreeing on them, and the sum over what each gives.
#include "src/layer/slices.h"

#include <cstring>
#include <string>

#include <expar/collectives.h>

#include "src/layer/agree.h"
#include "src/layer/convert.h"

namespace expar {

Slices::Slices(const Context& context, const MoeLayerOptions& options) : own_{0, options.inner} {
  if (!options.tensor || options.tensor.size() == 1) return;
  ranks_ = context.on(options.tensor);
  agree(*ranks_, options, [&] {
    if (options.inner < ranks_->size()) {
      throw Error(ErrorCode::bad_argument, "inner is " + std::to_string(options.inner) + ", fewer than the " +
                                               std::to_string(ranks_->size()) + " slices of tensor");
    }
    if (options.shared_ranks > 0) {
      throw Error(ErrorCode::bad_argument, "shared_ranks is " + std::to_string(options.shared_ranks) +
                                               ": where experts lie in slices the shared ones are on every rank");
    }
    own_ = experts_of(ranks_->rank(), ranks_->size(), options.inner);
  });
}

void Slices::sum(Tensor values) {
  if (!ranks_) return;
  const std::int64_t count = values.elements();
  const Tensor total = sum_.view(DType::f32, {count});
  all_reduce(*ranks_, ConstTensor(values.data(), DType::f32, {1, count}), total);
  if (count > 0) std::memcpy(values.data(), total.data(), total.byte_size());
}

void Slices::combine(const Context& context, const Plan& plan, Outbox& y, std::optional<ConstTensor> weights,
                     Tensor out, const CombineOptions& options) {
  if (!ranks_) return expar::combine(context, plan, y, weights, out, options);
  const Tensor part = part_.view(out.dtype(), out.shape());
  expar::combine(context, plan, y, weights, part);
  Tensor total = part;
  if (out.dtype() != DType::f32) {
    total = wide_.view(DType::f32, out.shape());
    to_f32(part, total, context.pool());
  }
  sum(total);
  alone(context, [&] {
    Reduce add{.tokens = out.size(0), .width = out.size(1), .dtype = DType::f32, .out = total.data()};
    if (!options.shared.absent()) {
      add.shared = options.shared.as<float>();
      add.shared_weights = options.shared_weights.absent() ? nullptr : options.shared_weights.as<float>();
      add.residual = total.data();
      context.kernels().reduce(add, context.pool());
    }
    context.kernels().reduce({.tokens = out.size(0),
                              .width = out.size(1),
                              .dtype = out.dtype(),
                              .shared = total.as<float>(),
                              .residual = options.residual.data(),
                              .out = out.data(),
                              .norm = checked(options.norm, out.dtype(), out.shape())},
                             context.pool());
  });
}

}  // namespace expar
