// Blocks that ranks show each other in an operation, and reading them: in place where mapped, as messages elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory_resource>
#include <span>
#include <string_view>
#include <vector>

#include <expar/communicator.h>

namespace expar {

/// The words of a ready that shows `block`; the last two are the operation's own.
Operation::Words show(const Block& block, std::uint64_t first = 0, std::uint64_t second = 0);
inline std::uint64_t first_word(const Operation::Words& words) { return words[3]; }
inline std::uint64_t second_word(const Operation::Words& words) { return words[4]; }
inline std::size_t shown_bytes(const Operation::Words& words) { return words[2]; }

/// The block that a mapped `peer` showed. What the peer wrote is checked against its segment: a lie is the job's end.
std::span<std::byte> shown_block(const Communicator& communicator, const Operation& operation, int peer);

/// Part of a block.
struct Slice {
  std::size_t offset = 0;
  std::size_t bytes = 0;
};

/// Transfers with ranks that are not mapped, one ticket for each of them, so that a late one can be named.
class Transfers {
 public:
  void send(int peer, const std::byte* data, std::size_t bytes);
  void receive(int peer, std::byte* data, std::size_t bytes);
  /// Posts what was collected. Nothing happens where nothing was.
  void start(const Communicator& communicator, const Operation& operation);
  /// Waits for all of it; `what` completes "rank 3 is late: ...".
  void finish(const Communicator& communicator, const Operation& operation, std::string_view what);

 private:
  std::map<int, std::vector<Message>> messages_;  // by peer
  std::map<int, Transport::Ticket> tickets_;
};

/// One rank's reading of the others' blocks. The blocks are valid until the operation is complete.
class Reading {
 public:
  /// Once all have agreed: reads wants[p] of the block of every rank p, and serves gives[p] of `mine` to those that
  /// cannot address it. What p wants of mine and what I give it are the same slice, each end knowing its own.
  Reading(const Communicator& communicator, const Operation& operation, const Block& mine, std::span<const Slice> wants,
          std::span<const Slice> gives);

  /// Waits until everything is there, and everything given is gone.
  void finish(const Communicator& communicator, const Operation& operation);

  /// wants[peer] of `peer`'s block; valid after finish().
  std::span<const std::byte> from(int peer) const { return parts_[static_cast<std::size_t>(peer)]; }

 private:
  std::pmr::vector<std::span<const std::byte>> parts_;
  std::vector<std::byte> received_;
  Transfers transfers_;
};

}  // namespace expar
