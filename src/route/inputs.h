// What a router is given beside its options, and what of it is refused.
#pragma once

#include <expar/router.h>

namespace expar {

/// Throws Error: bad_argument, naming the value.
///   logits : [T, E] f32
void check_inputs(const RouteInputs& inputs, const RouterOptions& options, const ConstTensor& logits);

}  // namespace expar
