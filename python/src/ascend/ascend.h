// What the files of this folder share. Names begin with _ascend_: expar.ascend is what they are for.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include <expar/ascend.h>
#include <expar/context.h>

#include "python/src/bind.h"
#include "python/src/tensor.h"

namespace expar::python {

using namespace nb::literals;

/// An array that Python owns; None of one that is absent.
std::optional<View> given(Array array);

/// What `work` returns, while Python's other threads run.
template <class Work>
auto released(Work&& work) {
  const nb::gil_scoped_release release;
  return work();
}

/// Throws Error: bad_argument (no such name, with the list).
inline std::optional<DType> dtype_named(const std::optional<std::string>& name) {
  return name ? std::optional(parse_dtype(*name)) : std::nullopt;
}

/// A domain, and the memory of its comm_alg.
struct DomainValue {
  ascend::Domain domain;
  std::string comm_alg;

  ascend::Domain get() const {
    ascend::Domain told = domain;
    told.comm_alg = comm_alg;
    return told;
  }
};

void bind_ascend_activation(nb::module_& m);
void bind_ascend_distribute(nb::module_& m);
void bind_ascend_distribute_v2(nb::module_& m);
void bind_ascend_domain(nb::module_& m);
void bind_ascend_gating(nb::module_& m);
void bind_ascend_init_routing(nb::module_& m);
void bind_ascend_matmul(nb::module_& m);
void bind_ascend_permutation(nb::module_& m);
void bind_ascend_placement(nb::module_& m);

}  // namespace expar::python
