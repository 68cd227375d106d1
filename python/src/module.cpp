// The extension module: each public header has a file of its own here, and a function that binds it.
#include <nanobind/nanobind.h>

#include <expar/version.h>

#include "python/src/bind.h"
#include "python/src/error.h"

NB_MODULE(_native, m) {
  using namespace expar::python;
  m.doc() = "expar's C++ library. Import expar.";
  nb::set_leak_warnings(false);  // PyTorch keeps graphs, and what they hold, to the very end
  m.attr("__version__") = expar::version();
  bind_error(m);
  bind_tensor(m);
  bind_trace(m);
  bind_communicator(m);
  bind_registry(m);
  bind_launch(m);
  bind_carried(m);
  bind_context(m);
  bind_collectives(m);
  bind_mesh(m);
  bind_plan(m);
  bind_dispatch(m);
  bind_permute(m);
  bind_kernels(m);
  bind_router(m);
  bind_capacity(m);
  bind_optimizer(m);
  bind_experts(m);
  bind_norm(m);
  bind_partition(m);
  bind_special(m);
  bind_random(m);
  bind_layer(m);
  bind_hidden_moe(m);
  bind_ascend(m);
}
