// Choices that need the whole batch.
#pragma once

#include <span>
#include <vector>

#include <expar/router.h>

namespace expar {

/// Rows of all ranks' tokens that are no padding, in global order. Pieces of them are the same for every P.
struct BatchRows {
  ConstTensor all;         // [T of all ranks, E] f32
  std::int64_t first = 0;  // this rank's first
};

/// Lies in routing.scratch until that is used again.
///   prepare : this rank's rows [T, E] f32, for which it may lay out the routing; if it throws, every rank throws
/// Collective. Cost: one operation, in which every rank reads all rows.
BatchRows gather_rows(const Context& context, const RouterOptions& options, Routing& routing,
                      FunctionRef<ConstTensor()> prepare);

/// [E] what is to be added to the logits, so that they share the batch out evenly: the logarithms of the factors of the
/// columns that make exp(logits), its rows scaled too, a matrix whose rows sum to 1 / T and whose columns to 1 / E.
std::vector<double> sinkhorn_bias(const Context& context, const ConstTensor& logits);

/// Writes the routing's ids, each token's in descending score: every expert takes its best tokens by `scores`.
void let_experts_choose(const Context& context, const RouterOptions& options, const BatchRows& scores,
                        const Routing& routing);

}  // namespace expar
