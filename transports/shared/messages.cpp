// The accounts of tickets.
#include "transports/shared/messages.h"

#include <algorithm>
#include <string>

#include <expar/error.h>

namespace expar::local {

Messages::Ticket Messages::start(std::span<const Message> messages) {
  for (const Message& message : messages) {
    if (message.peer < 0 || message.peer >= size_) {
      throw Error(ErrorCode::internal,
                  "a message names rank " + std::to_string(message.peer) + " of " + std::to_string(size_), {rank_});
    }
  }
  const Ticket ticket = next_++;
  open_.push_back({ticket, messages.size()});
  in_flight_ += messages.size();
  for (const Message& message : messages) post(message, ticket);
  advance();
  return ticket;
}

bool Messages::take_complete(Ticket ticket) {
  const auto entry =
      std::find_if(open_.begin(), open_.end(), [ticket](const Open& open) { return open.ticket == ticket; });
  if (entry == open_.end()) {
    throw Error(ErrorCode::internal, "a ticket of messages was tested after it had completed", {rank_});
  }
  if (entry->left > 0) return false;
  open_.erase(entry);
  return true;
}

void Messages::complete(Ticket ticket) {
  --in_flight_;
  for (Open& open : open_) {
    if (open.ticket == ticket) --open.left;
  }
}

void Messages::check_size(const Message& receive, std::size_t bytes) const {
  if (receive.bytes == bytes) return;
  throw Error(ErrorCode::mismatch,
              "rank " + std::to_string(receive.peer) + " sends " + std::to_string(bytes) + " bytes where rank " +
                  std::to_string(rank_) + " receives " + std::to_string(receive.bytes) + " (message " +
                  std::to_string(receive.tag) + ")",
              {rank_, receive.peer, {}});
}

}  // namespace expar::local
