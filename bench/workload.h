// Tokens, choices and weights of a benchmark, made so that every rank knows what every other must send it.
#pragma once

#include <cstdint>
#include <vector>

#include <expar/parallel.h>

#include "bench/bench.h"

namespace expar::bench {

/// Writes row `row` of an endless table: never zero throughout, and exact in bf16, so that what has travelled can be
/// compared as it is.
void fill_row(std::uint64_t row, DType dtype, std::int64_t width, void* out);

/// Elements of two rows that differ.
std::int64_t count_wrong(const void* got, const void* wanted, DType dtype, std::int64_t width);

/// One (token, slot) that an expert must get.
struct Arrival {
  std::int64_t token = 0;  // counted over all ranks
  std::int64_t slot = 0;
};

/// For each rank of ranks.experts the tokens that it works on, counted over all ranks: those of the ranks that hold
/// slices of the same experts, `tokens` of each. Collective.
std::vector<std::vector<std::int64_t>> tokens_by_rank(const Parallel& ranks, std::int64_t tokens);

class Workload {
 public:
  /// Collective: ranks may not differ in options.
  Workload(const Parallel& ranks, const Options& options);

  const Options& options() const { return options_; }
  int slices() const { return slices_; }  // of each expert
  /// [T] this rank's tokens, counted over all ranks.
  const std::vector<std::int64_t>& tokens() const { return tokens_; }
  ConstTensor x() const { return x_; }              // [T, H], row t is table row tokens()[t]
  ConstTensor ids() const { return ids_; }          // [T, K]
  ConstTensor all_ids() const;                      // [P T, K] of all ranks
  ConstTensor weights() const { return weights_; }  // [T, K], sixteenths: products with table rows are exact
  float weight(std::int64_t token, std::int64_t slot) const;
  std::int32_t id(std::int64_t token, std::int64_t slot) const {
    return all_ids_[static_cast<std::size_t>(token * options_.topk + slot)];
  }

  /// For each local expert, what must reach it, in order: (source rank, token, slot).
  const std::vector<std::vector<Arrival>>& arrivals() const { return arrivals_; }
  /// The table row of what a slice of an expert answers to (token, slot) where the answer is made up.
  std::uint64_t answer_row(const Arrival& a, int slice) const;

 private:
  Options options_;
  int slices_;
  std::vector<std::int64_t> tokens_;
  std::vector<std::int32_t> all_ids_;
  Array x_, ids_, weights_;
  std::vector<std::vector<Arrival>> arrivals_;
};

/// Elements (and weights, and rows too many or missing) of `inbox` that are not what must arrive.
std::int64_t count_wrong(const Workload& workload, const Inbox& inbox);

}  // namespace expar::bench
