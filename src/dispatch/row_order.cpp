// Where a layout puts the rows of a plan.
#include "src/dispatch/row_order.h"

#include <algorithm>
#include <string>

#include "src/dispatch/plan_data.h"
#include "src/util/check.h"

namespace expar {
namespace {

int ranks_of(const Plan& plan) { return static_cast<int>(plan.sources().size()) - 1; }

/// Rows that `source` has for `expert`.
std::int64_t count(const Plan& plan, int source, std::int64_t expert) {
  return plan.counts()[at(source) * at(plan.experts()) + at(expert)];
}

/// Rows that the ranks below `rank` have for `range`.
std::int64_t rows_below(const Plan& plan, int rank, const ExpertRange& range) {
  std::int64_t rows = 0;
  for (int s = 0; s < rank; ++s) {
    for (std::int64_t e = range.first; e < range.first + range.count; ++e) rows += count(plan, s, e);
  }
  return rows;
}

}  // namespace

std::string_view name(Layout layout) {
  constexpr std::string_view kNames[] = {"indexed", "expert_major", "padded", "rank_major"};
  return kNames[static_cast<std::size_t>(layout)];
}

RowOrder::RowOrder(const Plan& plan, int rank, Layout layout, std::int64_t capacity)
    : plan_(plan), layout_(layout), capacity_(capacity) {
  if (plan.data().replicated) rank = 0;  // nobody's rows stand before another's
  if (layout == Layout::rank_major) order_by_rank(rank);
  if (layout == Layout::padded) pad(rank);
}

void RowOrder::order_by_rank(int rank) {
  const ExpertRange local = plan_.local();
  offsets_.reserve(at(ranks_of(plan_) * local.count) + 1);
  offsets_.push_back(0);
  for (int s = 0; s < ranks_of(plan_); ++s) {
    for (std::int64_t e = 0; e < local.count; ++e)
      offsets_.push_back(offsets_.back() + count(plan_, s, local.first + e));
  }
  shifts_.resize(at(plan_.experts()));
  for (int owner = 0; owner < ranks_of(plan_); ++owner) {
    const ExpertRange range = plan_.held_by(owner);
    std::int64_t row = rows_below(plan_, rank, range);
    for (std::int64_t e = range.first; e < range.first + range.count; ++e) {
      shifts_[at(e)] = row - plan_.data().slot_start_of(e);
      row += count(plan_, rank, e);
    }
  }
}

void RowOrder::pad(int rank) {
  for (std::int64_t e = 0; e <= plan_.local().count; ++e) offsets_.push_back(e * capacity_);
  shifts_.resize(at(plan_.experts()));
  for (int owner = 0; owner < ranks_of(plan_); ++owner) {
    const ExpertRange range = plan_.held_by(owner);
    for (std::int64_t e = 0; e < range.count; ++e) {
      const std::int64_t row = e * capacity_ + rows_below(plan_, rank, {range.first + e, 1});
      shifts_[at(range.first + e)] = row - plan_.data().slot_start_of(range.first + e);
    }
  }
}

Shape RowOrder::shape(std::int64_t width) const {
  return layout_ == Layout::padded ? Shape{plan_.local().count, capacity_, width} : Shape{rows(), width};
}

std::int64_t RowOrder::source_start(int source, std::int64_t e) const {
  if (layout_ == Layout::rank_major) return offsets_[at(source * plan_.local().count + e)];
  return offsets()[at(e)] + plan_.data().source_start_of(source, e) - plan_.offsets()[at(e)];
}

void check_capacity(const Plan& plan, Layout layout, std::int64_t capacity) {
  if (layout != Layout::padded) return;
  const auto totals = plan.expert_totals();
  const auto most = std::max_element(totals.begin(), totals.end());
  if (*most <= capacity) return;
  refuse("expert " + std::to_string(most - totals.begin()) + " has " + std::to_string(*most) +
         " rows, the padded layout a capacity of " + std::to_string(capacity) + ": give it at least that many");
}

}  // namespace expar
