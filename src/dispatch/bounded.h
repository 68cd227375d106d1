// Rows of a bounded plan: each rank shows all of its own on a shelf, and takes what it needs from those of the others.
#pragma once

#include <optional>

#include "src/dispatch/carrier.h"
#include "src/util/shown.h"

namespace expar {

/// A shelf has room for the bound's tokens of one rank: its counts, then token by token the experts and weights of its
/// slots, then its rows. Ranks so meet once.
class BoundedRows final : public Carrier {
 public:
  explicit BoundedRows(const Shipment& shipment);
  Operation::Words show() override;
  void send() override;
  Plan complete() override;
  void receive() override;
  void round_own(std::byte* to) const override;

 private:
  std::span<const std::int32_t> take(int source, std::size_t most, SlotTag* tags);

  std::size_t tags_at_, rows_at_, bytes_;  // of a shelf
  Block shelf_;
  std::optional<Reading> shelves_;
  std::pmr::vector<std::int32_t> tokens_;
};

}  // namespace expar
