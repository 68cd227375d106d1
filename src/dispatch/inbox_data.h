// What an inbox holds.
#pragma once

#include <memory>
#include <optional>

#include <expar/dispatch.h>

#include "src/dispatch/lists.h"
#include "src/dispatch/row_order.h"
#include "src/util/check.h"
#include "src/util/shown.h"

namespace expar {

/// Room for rows as they travel and, behind them, for the tags that come beside each.
class Room {
 public:
  Room() = default;
  Room(const Communicator& communicator, std::int64_t rows, std::size_t row_bytes, std::size_t tag_bytes)
      : row_bytes_(row_bytes),
        tag_bytes_(tag_bytes),
        tags_at_(whole_lines(at(rows) * row_bytes)),
        block_(communicator.allocate(tags_at_ + at(rows) * tag_bytes)) {}

  Block& block() { return block_; }
  std::size_t tags_at() const { return tags_at_; }
  std::byte* row(std::int64_t i) const { return block_.data() + at(i) * row_bytes_; }
  SlotTag* tags(std::int64_t i) const {
    return reinterpret_cast<SlotTag*>(block_.data() + tags_at_ + at(i) * tag_bytes_);
  }

 private:
  std::size_t row_bytes_ = 0, tag_bytes_ = 0, tags_at_ = 0;
  Block block_;
};

struct Inbox::Data {
  /// Copies all rows into the order of the layout, rows of padding zero.
  void pack(const Context& context, Layout layout, std::int64_t capacity);

  Plan plan;
  Room room;  // of [U, H]
  Block packed_block;
  Block read_block;  // where rows travel as a payload: [U, H] as they were, then this rank's own [T, H]
  ConstTensor x, rows, packed;
  std::shared_ptr<Lists> lists;
  Layout layout = Layout::indexed;
  std::optional<RowOrder> order;

 private:
  void pack(const Context& context, std::int64_t first, std::int64_t count, std::int64_t to);
};

}  // namespace expar
