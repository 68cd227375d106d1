// Where the K results of each token lie: in the outboxes of mapped ranks, or in what the others sent.
#pragma once

#include <cstddef>
#include <vector>

#include <expar/dispatch.h>

namespace expar {

/// The results [T, K] that this rank reads in one operation, in which every rank shows its outbox.
class Results {
 public:
  /// After meet(). Rows are `row_bytes` long. Collective where ranks are not mapped.
  Results(const Communicator& communicator, const Operation& operation, const Plan& plan, const Outbox& own,
          std::size_t row_bytes);

  /// [T, K] first byte of each result; null where the slot is not routed.
  const void* const* slots() const { return slots_.data(); }

 private:
  std::vector<const void*> slots_;
  std::vector<std::byte> received_;
};

}  // namespace expar
