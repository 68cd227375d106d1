// What a rank shows in the dispatch of a bounded plan, and how it takes what it needs from the others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <optional>
#include <span>
#include <vector>

#include "src/dispatch/lists.h"
#include "src/util/shown.h"

namespace expar {

/// Room for the bound's tokens of one rank: its counts, then token by token the experts and weights of its slots, then
/// its rows. Every rank fills its own and reads those of the others, so that they meet once.
class Shelf {
 public:
  /// `plan` is open, rows are `row_bytes` long.
  Shelf(const Context& context, const Operation& operation, const Plan& plan, std::size_t row_bytes);

  /// Takes the room and fills in all but the rows, which go to rows(). For Operation::ready.
  Operation::Words show(const float* weights);
  std::byte* rows() const { return block_.data() + rows_at_; }

  /// Once all have agreed.
  void read();
  /// Waits for what ranks that are not mapped send, and completes the plan.
  Plan complete();

  /// The tokens of `source` that this rank needs, ascending; their tags go to `tags`, by slot. What a peer wrote is not
  /// followed: there are `most` at the most.
  std::span<const std::int32_t> take(int source, std::size_t most, SlotTag* tags);
  const std::byte* rows_of(int source) const { return reading_->from(source).data() + rows_at_; }

 private:
  Context context_;
  const Operation& operation_;
  Plan plan_;
  std::size_t tags_at_, rows_at_, bytes_;
  Block block_;
  std::optional<Reading> reading_;
  std::pmr::vector<std::int32_t> tokens_;
};

}  // namespace expar
