// Rows of an exact plan: each rank writes them straight into the inboxes of the others, whose places it knows.
#pragma once

#include "src/dispatch/carrier.h"
#include "src/util/shown.h"

namespace expar {

class ExactRows final : public Carrier {
 public:
  using Carrier::Carrier;
  Operation::Words show() override;
  void send() override;
  void receive() override;

 private:
  void write_to(int peer);
  std::size_t staged_bytes(int peer) const;
  void post(int peer, std::byte* stage);

  // For ranks that are not mapped.
  Block staging_;
  Transfers transfers_;
};

}  // namespace expar
