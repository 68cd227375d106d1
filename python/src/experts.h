// Experts as Python describes them: what the layers and the plain calls take alike.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include <expar/experts.h>

#include "python/src/names.h"
#include "python/src/tensor.h"

namespace expar::python {

inline constexpr Named<WeightsOn> kWeightsOn[] = {
    {"output", WeightsOn::output}, {"inner", WeightsOn::inner}, {"input", WeightsOn::input}};

/// {"alpha": 1.5, ...}
using ActivationSettings = nanobind::typed<nanobind::dict, nanobind::str, float>;

/// An activation by name, with its numbers or other ones. Throws Error: bad_argument.
NamedActivation activation_of(const std::string& name, const nanobind::dict& numbers);

/// The arrays of a rank's experts.
struct ExpertArrays {
  In up, down, up_bias, down_bias;

  /// As views. Throws Error: bad_argument (the shape cannot be, or is not that of `experts` of these arrays).
  ExpertWeights of(const ExpertShape& shape, std::int64_t experts) const;
};

}  // namespace expar::python
