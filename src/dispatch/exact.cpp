// Rows of an exact plan.
#include "src/dispatch/exact.h"

#include <string>

#include "src/util/store_choice.h"

namespace expar {

Operation::Words ExactRows::show() {
  room = Room(context.communicator(), plan.unique(), payload.row_bytes(), tag_bytes);
  return operation.show(room.block(), room.tags_at());
}

void ExactRows::send() {
  const auto mapped = [&](int peer) { return operation.communicator().mapped(peer); };
  std::size_t staged = 0;
  for (int peer = 0; peer < context.size(); ++peer) {
    if (!mapped(peer)) staged += staged_bytes(peer);
  }
  staging_ = operation.room(staged);
  std::byte* stage = staging_.data();
  // The nearest rank above comes first, so that ranks do not all write to the same one.
  for (int step = 1; step < context.size(); ++step) {
    const int peer = (context.rank() + step) % context.size();
    if (mapped(peer)) {
      write_to(peer);
    } else {
      post(peer, stage);
      stage += staged_bytes(peer);
    }
  }
  operation.gave_all();
  transfers_.start(operation);
}

void ExactRows::write_to(int peer) {
  const auto tokens = plan.sends(peer);
  if (tokens.empty()) return;
  const auto block = shown_block(operation, peer);
  const std::size_t first = at(plan.send_row(peer)), end = first + tokens.size(), row_bytes = payload.row_bytes();
  const std::size_t tags_at = first_word(operation.words(peer));
  if (end * row_bytes > tags_at || tags_at > block.size() || end * tag_bytes > block.size() - tags_at) {
    context.communicator().blame(
        peer, operation.name(),
        "showed an inbox of " + std::to_string(block.size()) + " bytes, too small for its plan");
  }
  std::byte* const to = block.data() + first * row_bytes;
  if (payload) {
    payload.write(to, x, tokens, Store::cached);
  } else {
    context.stores().run(tokens.size() * row_bytes, [&](Store store) { payload.write(to, x, tokens, store); });
  }
  if (tag_bytes == 0) return;
  write_tags(plan, peer, tokens, weights, reinterpret_cast<SlotTag*>(block.data() + tags_at + first * tag_bytes));
}

/// Of the rows and tags for `peer`.
std::size_t ExactRows::staged_bytes(int peer) const {
  const std::size_t tokens = plan.sends(peer).size();
  return whole_lines(tokens * payload.row_bytes()) + whole_lines(tokens * tag_bytes);
}

/// Collects the transfers to and from a rank that is not mapped.
void ExactRows::post(int peer, std::byte* stage) {
  const auto tokens = plan.sends(peer);
  const std::size_t bytes = tokens.size() * payload.row_bytes();
  payload.write(stage, x, tokens, Store::cached);
  transfers_.send(peer, stage, bytes);
  if (tag_bytes > 0) {
    std::byte* const tags = stage + whole_lines(bytes);
    write_tags(plan, peer, tokens, weights, reinterpret_cast<SlotTag*>(tags));
    transfers_.send(peer, tags, tokens.size() * tag_bytes);
  }
  const std::int64_t first = plan.sources()[at(peer)];
  const std::size_t count = at(plan.sources()[at(peer + 1)] - first);
  transfers_.receive(peer, room.row(first), count * payload.row_bytes());
  transfers_.receive(peer, reinterpret_cast<std::byte*>(room.tags(first)), count * tag_bytes);
}

void ExactRows::receive() {
  for (int peer = 0; peer < context.size(); ++peer) {
    const bool expected = plan.sources()[at(peer + 1)] > plan.sources()[at(peer)];
    if (expected && operation.communicator().mapped(peer)) operation.await_given(peer, "its rows");
  }
  transfers_.finish(operation, "its rows");
}

}  // namespace expar
