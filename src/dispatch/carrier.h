// How rows come from rank to rank in a dispatch.
#pragma once

#include <expar/dispatch.h>
#include <expar/operation.h>

#include "src/dispatch/inbox_data.h"
#include "src/dispatch/row_payload.h"

namespace expar {

/// What a rank hands in to a dispatch, and where the rows of the others arrive.
struct Shipment {
  const Context& context;
  Operation& operation;
  const Plan& plan;  // complete once finish has made it so
  ConstTensor x;
  const float* weights;  // or null: all are 1
  const RowPayload& payload;
  std::size_t tag_bytes;  // beside each row; 0: only rows travel
  Room& room;
};

/// One way for rows to travel. This one carries none, as for a replicated plan: every rank has them.
class Carrier : protected Shipment {
 public:
  explicit Carrier(const Shipment& shipment) : Shipment(shipment) {}
  virtual ~Carrier() = default;

  /// Returns what this rank shows in its ready.
  virtual Operation::Words show() { return {}; }
  /// Once all have agreed: gives the others what they wait for. Never waits.
  virtual void send() {}
  /// The complete plan; waits where it was open. The room is there from now on, if not before.
  virtual Plan complete() { return plan; }
  /// Waits until the rows and tags of the others stand in the room, source by source.
  virtual void receive() {}
  /// This rank's own rows as those that travel as a payload arrive.
  virtual void round_own(std::byte* to) const { payload.round(to, x); }
};

}  // namespace expar
