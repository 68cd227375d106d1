// Experts in slices of their inner dimension: agreeing on them, and a sum over them.
#include "src/layer/slices.h"

#include <cstring>
#include <string>

#include <expar/collectives.h>

#include "src/layer/agree.h"

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

}  // namespace expar
