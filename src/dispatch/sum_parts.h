// The end of a combine whose experts lie in slices: each rank has a part of every result, and their sum is due.
#pragma once

#include <expar/dispatch.h>

namespace expar {

/// out [T, H] = the sum over the context's ranks of what `write` gives on each, in rank order, and then what `options`
/// adds, in f32, rounded once. Each rank adds up rows part_of(T, rank, P), and reads those of the others.
///   plan, width, dtype : of the results, which out may contradict: then `write` throws
///   write              : fills the part of this rank, [T, H]; what it throws every rank throws
/// Collective: T, H and dtype are the same on all ranks. Throws Error: what `write` throws, mismatch, timeout,
/// peer_lost.
/// Cost: 2 (P - 1) / P of the T rows travel to each rank; T rows of the arena, no allocation after the first call.
void sum_parts(const Context& context, const Plan& plan, std::int64_t width, DType dtype, Tensor out,
               const CombineOptions& options, FunctionRef<void(Tensor)> write);

}  // namespace expar
