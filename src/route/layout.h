// Where the tensors of a routing lie in its memory.
#pragma once

#include <expar/router.h>

namespace expar {

/// Whether a choice compares something else than the scores.
bool compares_others(const RouterOptions& options);

/// Gives every tensor of `routing` its shape and its place; those that would be the same are one.
void lay_out(std::int64_t tokens, const RouterOptions& options, bool has_mask, Routing& routing);

}  // namespace expar
