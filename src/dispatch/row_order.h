// Where a layout puts the rows of a plan.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <expar/dispatch.h>

namespace expar {

/// The rows of one source for one expert stand together in every layout, so where each of these pieces begins says
/// everything, here and on the ranks that hold this rank's results.
class RowOrder {
 public:
  RowOrder(const Plan& plan, int rank, Layout layout, std::int64_t capacity);

  /// As Inbox::offsets.
  std::span<const std::int64_t> offsets() const { return offsets_.empty() ? plan_.offsets() : std::span(offsets_); }
  /// Rows here, those of padding included.
  std::int64_t rows() const { return offsets().back(); }
  /// The shape of all rows, `width` elements each.
  Shape shape(std::int64_t width) const;
  /// First row here of `source`'s slots of local expert `e`.
  std::int64_t source_start(int source, std::int64_t e) const;
  /// Where the rank of `expert` holds what the plan has in its row `row`.
  std::int64_t row(std::int64_t row, std::int64_t expert) const {
    return shifts_.empty() ? row : row + shifts_[static_cast<std::size_t>(expert)];
  }

 private:
  void order_by_rank(int rank);
  void pad(int rank);

  Plan plan_;
  Layout layout_;
  std::int64_t capacity_;
  std::vector<std::int64_t> offsets_;  // empty: the plan's
  std::vector<std::int64_t> shifts_;   // [E] from this rank's rows of an expert in the plan; empty: none
};

/// Throws Error: bad_argument where an expert of any rank has more rows than fit: the same on every rank.
void check_capacity(const Plan& plan, Layout layout, std::int64_t capacity);

}  // namespace expar
