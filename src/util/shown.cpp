// Blocks that ranks show each other in an operation.
#include "src/util/shown.h"

#include <cstring>
#include <string>

namespace expar {
Operation::Words show_copy(const Operation& operation, Block& block, std::span<const std::byte> bytes,
                           std::uint64_t first, std::uint64_t second) {
  block = operation.communicator().allocate(bytes.size());
  if (!bytes.empty()) std::memcpy(block.data(), bytes.data(), bytes.size());
  return operation.show(block, first, second);
}

std::span<std::byte> shown_block(const Operation& operation, int peer) {
  const auto& words = operation.words(peer);
  const Communicator& communicator = operation.communicator();
  const auto segment = communicator.transport().map(communicator.job_rank(peer), static_cast<std::uint32_t>(words[0]));
  const std::uint64_t offset = words[1];
  const std::uint64_t bytes = words[2];
  if (offset > segment.size() || bytes > segment.size() - offset) {
    communicator.blame(peer, operation.name(),
                       "showed " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
                           " of a segment of " + std::to_string(segment.size()));
  }
  return segment.subspan(offset, bytes);
}

void Transfers::send(int peer, const std::byte* data, std::size_t bytes) {
  if (bytes > 0)
    messages_[peer].push_back({.kind = Message::Kind::send, .data = const_cast<std::byte*>(data), .bytes = bytes});
}

void Transfers::receive(int peer, std::byte* data, std::size_t bytes) {
  if (bytes > 0) messages_[peer].push_back({.kind = Message::Kind::receive, .data = data, .bytes = bytes});
}

void Transfers::start(const Operation& operation) {
  for (auto& [peer, messages] : messages_) {
    for (Message& message : messages) {
      message.peer = operation.communicator().job_rank(peer);
      message.tag = operation.number();
    }
    tickets_[peer] = operation.communicator().transport().start(messages);
  }
}

void Transfers::finish(const Operation& operation, std::string_view what) {
  const Communicator& communicator = operation.communicator();
  for (const auto& [peer, ticket] : tickets_) {
    communicator.wait([&, posted = ticket] { return communicator.transport().test(posted); },
                      operation.waiting(peer, what));
  }
}

Reading::Reading(const Operation& operation, const Block& mine, FunctionRef<ByteRange(int)> wants,
                 FunctionRef<ByteRange(int)> gives)
    : operation_(operation), parts_(operation.communicator().memory().get()) {
  const Communicator& communicator = operation.communicator();
  const int self = communicator.rank();
  std::size_t room = 0;
  for (int peer = 0; peer < communicator.size(); ++peer) {
    const auto [offset, bytes] = wants(peer);
    auto& part = parts_.emplace_back();
    if (bytes == 0) continue;
    if (peer == self) {
      part = {mine.data() + offset, bytes};
    } else if (communicator.mapped(peer)) {
      const auto block = shown_block(operation, peer);
      if (offset > block.size() || bytes > block.size() - offset) {
        communicator.blame(peer, operation.name(),
                           "showed " + std::to_string(block.size()) + " bytes where " + std::to_string(offset + bytes) +
                               " are needed");
      }
      part = block.subspan(offset, bytes);
    } else {
      room += whole_lines(bytes);
    }
  }

  received_ = operation.room(room);
  std::byte* to = received_.data();
  for (int peer = 0; peer < communicator.size(); ++peer) {
    if (peer == self || communicator.mapped(peer)) continue;
    const std::size_t bytes = wants(peer).bytes;
    parts_[static_cast<std::size_t>(peer)] = {to, bytes};
    transfers_.receive(peer, to, bytes);
    to += whole_lines(bytes);
    const auto [offset, given] = gives(peer);
    transfers_.send(peer, mine.data() + offset, given);
  }
  transfers_.start(operation);
}

void Reading::finish() { transfers_.finish(operation_, "its part"); }

void share(const Communicator& communicator, const Signature& signature,
           FunctionRef<Operation::Words(const Operation&, Block&)> show,
           FunctionRef<void(Operation&, const Reading&)> use) {
  Operation operation(communicator, signature);
  Block block;
  operation.ready([&] { return show(operation, block); });
  operation.meet();
  Reading reading(
      operation, block,
      [&](int peer) {
        return ByteRange{0, shown_bytes(operation.words(peer))};
      },
      [&](int) {
        return ByteRange{0, block.size()};
      });
  reading.finish();
  use(operation, reading);
  operation.complete();
}

}  // namespace expar
