// include/expar/ascend.h
#include "python/src/ascend/ascend.h"

namespace expar::python {

std::optional<View> given(Array array) {
  if (!array) return std::nullopt;
  auto* const owned = new Array(std::move(array));
  const nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<Array*>(p); });
  return view(static_cast<const Tensor&>(owned->view()), owner);
}

void bind_ascend(nb::module_& m) {
  bind_ascend_domain(m);
  bind_ascend_distribute(m);
  bind_ascend_distribute_v2(m);
  bind_ascend_placement(m);
  bind_ascend_gating(m);
  bind_ascend_init_routing(m);
  bind_ascend_permutation(m);
  bind_ascend_activation(m);
  bind_ascend_matmul(m);
}

}  // namespace expar::python
