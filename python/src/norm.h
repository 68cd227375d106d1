// RMSNorm's arrays, for the norm alone and for the one after a combine.
#pragma once

#include <optional>

#include <expar/norm.h>

#include "python/src/tensor.h"

namespace expar::python {

struct NormArrays {
  In gain;
  Out y;
  std::optional<Out> scale;
  float epsilon = 1e-6F;

  /// Throws Error: bad_argument.
  RmsNorm get() const {
    return {.gain = read(gain, "the norm's gain"),
            .epsilon = epsilon,
            .y = written(y, "the norm's y"),
            .scale = scale ? written(*scale, "the norm's scale") : Tensor()};
  }
};

}  // namespace expar::python
