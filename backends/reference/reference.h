// The plain backend: obvious loops over every kernel, the oracle of the others and always built.
#pragma once

#include <expar/kernels.h>

namespace expar {

const Kernels& reference_kernels();

}  // namespace expar
