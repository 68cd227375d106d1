// Multiplies what the router reads by numbers near one (Fedus et al. 2021), which depend on the token and not on P.
#pragma once

#include <cstdint>

#include <expar/pool.h>
#include <expar/random.h>
#include <expar/tensor.h>

namespace expar {

struct Jitter {
  Random random;
  float most = 0.0F;             // numbers are from U(1 - most, 1 + most)
  std::int64_t first_token = 0;  // global number of the first token; padding is not counted
  ConstTensor mask;              // [T] int8 or absent

  /// rows [T, H] f32 become rows * numbers: those of x forwards, those of its gradient backwards.
  void apply(const Tensor& rows, Pool& pool) const;
};

}  // namespace expar
