// What parameters begin with: random numbers by the name of the whole matrix, whichever part of it is here.
#pragma once

#include <cstdint>
#include <string>

#include <expar/pool.h>
#include <expar/tensor.h>

#include "src/layer/part.h"

namespace expar {

/// Normal numbers of deviation 1 / sqrt(inputs), where `inputs` is the innermost extent: the part of a whole matrix of
/// them.
void draw(const MatrixPart& part, const Tensor& values, std::uint64_t seed, const std::string& stream, Pool& pool);

/// [V, K] int32: K different experts for each token id, all equally likely.
void draw_token_table(const Tensor& table, std::int64_t experts, std::uint64_t seed, const std::string& stream);

}  // namespace expar
