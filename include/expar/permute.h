// From rank-major to expert-major rows and back: for callers who carry rows by an all-to-all of their own.
//
// After an all-to-all rows stand rank-major, source by source and expert by expert in each; an expert's kernel wants
// them expert-major, expert by expert and source by source in each. `dispatch` needs neither: it has both as a Layout.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <expar/tensor.h>

namespace expar {

struct ExpertMajor {
  std::vector<std::int32_t> indices;  // [N] the rank-major row that stands at each place of the expert-major order
  std::vector<std::int64_t> rows;     // [L] of each local expert
};

/// The order of the rows that came from some ranks for L experts.
///   counts : [ranks, L] rows from each rank for each expert; N is their sum, which may be 0
/// Not collective. Throws Error: bad_argument (counts that are no multiple of the ranks, or one below 0; more than 2^31
/// - 1 rows). Cost: one pass over N.
ExpertMajor expert_major(std::span<const std::int64_t> counts, int ranks);

/// out[i] = rows[indices[i]]: from rank-major to expert-major.
///   rows : [N, ...] of any dtype; out has the same shape and dtype, and is not rows
/// Its gradient is unpermute_rows.
/// Not collective. Throws Error: bad_argument (shapes; indices that are not each of 0 to N - 1 once). Cost: one copy of
/// the rows.
void permute_rows(ConstTensor rows, std::span<const std::int32_t> indices, Tensor out);

/// out[indices[i]] = rows[i]: what permute_rows did, undone, and its gradient. Otherwise like it.
void unpermute_rows(ConstTensor rows, std::span<const std::int32_t> indices, Tensor out);

}  // namespace expar
