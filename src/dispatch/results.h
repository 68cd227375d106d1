// Where the K results of each token lie: in the outboxes of mapped ranks, or in what the others sent.
#pragma once

#include <cstddef>
#include <memory_resource>
#include <vector>

#include <expar/dispatch.h>

#include "src/dispatch/row_order.h"
#include "src/util/shown.h"

namespace expar {

/// Rows of so many bytes, and the part of each that each rank reads.
struct RowParts {
  std::size_t row_bytes;
  std::pmr::vector<ByteRange> of;  // [P]
};

/// The results [T, K] that this rank reads in one operation, in which every rank shows its outbox.
class Results {
 public:
  /// Once all have agreed. Posts the transfers with ranks that are not mapped.
  Results(const Operation& operation, const Plan& plan, const RowOrder& order, const Outbox& own, RowParts&& parts);

  /// Waits for what others send. Returns [T, K]: the first byte of each result; null where the slot is not routed.
  const void* const* finish();

 private:
  std::byte* stage(int peer, std::byte* stage) const;
  void exchange();

  const Operation& operation_;
  const Plan& plan_;
  const RowOrder& order_;
  const Outbox& own_;
  RowParts parts_;
  std::pmr::vector<const void*> slots_;
  std::pmr::vector<const std::byte*> arrived_;  // [E] where this rank's rows of an expert of an unmapped rank arrive
  Block staging_, received_;
  Transfers transfers_;
};

}  // namespace expar
