// Blocks that ranks show each other in an operation.
#include "src/util/shown.h"

#include <string>

namespace expar {
namespace {

std::size_t padded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

Operation::Words show(const Block& block, std::uint64_t first, std::uint64_t second) {
  return {block.ref().segment, block.ref().offset, block.size(), first, second};
}

std::span<std::byte> shown_block(const Communicator& communicator, const Operation& operation, int peer) {
  const auto& words = operation.words(peer);
  const std::span<std::byte> segment = communicator.transport().map(peer, static_cast<std::uint32_t>(words[0]));
  const std::uint64_t offset = words[1];
  const std::uint64_t bytes = words[2];
  if (offset > segment.size() || bytes > segment.size() - offset) {
    communicator.blame(peer, operation.waiting(peer, "").operation,
                       "showed " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
                           " of a segment of " + std::to_string(segment.size()));
  }
  return segment.subspan(offset, bytes);
}

void Transfers::send(int peer, const std::byte* data, std::size_t bytes) {
  if (bytes > 0) messages_[peer].push_back({Message::Kind::send, peer, 0, const_cast<std::byte*>(data), bytes});
}

void Transfers::receive(int peer, std::byte* data, std::size_t bytes) {
  if (bytes > 0) messages_[peer].push_back({Message::Kind::receive, peer, 0, data, bytes});
}

void Transfers::start(const Communicator& communicator, const Operation& operation) {
  for (auto& [peer, messages] : messages_) {
    for (Message& message : messages) message.tag = operation.sequence();
    tickets_[peer] = communicator.transport().start(messages);
  }
}

void Transfers::finish(const Communicator& communicator, const Operation& operation, std::string_view what) {
  for (const auto& [peer, ticket] : tickets_) {
    communicator.wait([&, posted = ticket] { return communicator.transport().test(posted); },
                      operation.waiting(peer, what));
  }
}

Reading::Reading(const Communicator& communicator, const Operation& operation, const Block& mine,
                 std::span<const Slice> wants, std::span<const Slice> gives)
    : parts_(communicator.memory().get()) {
  auto& transport = communicator.transport();
  const int self = communicator.rank();
  const auto ranks = static_cast<std::size_t>(communicator.size());
  parts_.resize(ranks);

  std::size_t room = 0;
  for (std::size_t p = 0; p < ranks; ++p) {
    const int peer = static_cast<int>(p);
    if (wants[p].bytes == 0) continue;
    if (peer == self) {
      parts_[p] = {mine.data() + wants[p].offset, wants[p].bytes};
    } else if (transport.mapped(peer)) {
      const auto block = shown_block(communicator, operation, peer);
      if (wants[p].offset > block.size() || wants[p].bytes > block.size() - wants[p].offset) {
        communicator.blame(peer, operation.waiting(peer, "").operation,
                           "showed " + std::to_string(block.size()) + " bytes where " +
                               std::to_string(wants[p].offset + wants[p].bytes) + " are needed");
      }
      parts_[p] = block.subspan(wants[p].offset, wants[p].bytes);
    } else {
      room += padded(wants[p].bytes);
    }
  }

  received_.resize(room);
  std::size_t next = 0;
  for (std::size_t p = 0; p < ranks; ++p) {
    const int peer = static_cast<int>(p);
    if (peer == self || transport.mapped(peer)) continue;
    if (wants[p].bytes > 0) {
      parts_[p] = {received_.data() + next, wants[p].bytes};
      transfers_.receive(peer, received_.data() + next, wants[p].bytes);
      next += padded(wants[p].bytes);
    }
    transfers_.send(peer, mine.data() + gives[p].offset, gives[p].bytes);
  }
  transfers_.start(communicator, operation);
}

void Reading::finish(const Communicator& communicator, const Operation& operation) {
  transfers_.finish(communicator, operation, "its part");
}

}  // namespace expar
