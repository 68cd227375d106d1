// Blocks that ranks show each other in an operation, and reading them: in place where mapped, as messages elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory_resource>
#include <span>
#include <string_view>
#include <vector>

#include <expar/operation.h>

namespace expar {

/// What a rank showed with Operation::show.
inline std::size_t shown_bytes(const Operation::Words& words) { return words[2]; }
inline std::uint64_t first_word(const Operation::Words& words) { return words[3]; }
inline std::uint64_t second_word(const Operation::Words& words) { return words[4]; }

/// Takes a block for a copy of `bytes` and shows it.
Operation::Words show_copy(const Operation& operation, Block& block, std::span<const std::byte> bytes,
                           std::uint64_t first = 0, std::uint64_t second = 0);

/// The block that a mapped `peer` showed. What the peer wrote is checked against its segment: a lie is the job's end.
std::span<std::byte> shown_block(const Operation& operation, int peer);

/// Part of a block.
struct ByteRange {
  std::size_t offset = 0;
  std::size_t bytes = 0;
};

/// A multiple of a cache line, where the next thing can begin.
inline std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

/// Transfers with ranks that are not mapped, one ticket for each of them, so that a late one can be named. What they
/// read and write is shown by the operation or is Operation::room, since an exception may leave them under way.
class Transfers {
 public:
  void send(int peer, const std::byte* data, std::size_t bytes);
  void receive(int peer, std::byte* data, std::size_t bytes);
  /// Posts what was collected. Nothing happens where nothing was.
  void start(const Operation& operation);
  /// Waits for all of it; `what` completes "rank 3 is late: ...".
  void finish(const Operation& operation, std::string_view what);

 private:
  std::map<int, std::vector<Message>> messages_;  // by peer
  std::map<int, Transport::Ticket> tickets_;
};

/// One rank's reading of the others' blocks. The blocks are valid until the operation is complete.
class Reading {
 public:
  /// Once all have agreed: reads wants(p) of the block of every rank p, and serves gives(p) of `mine` to those that
  /// cannot address it. What p wants of mine and what I give it are the same range, each end knowing its own.
  Reading(const Operation& operation, const Block& mine, FunctionRef<ByteRange(int)> wants,
          FunctionRef<ByteRange(int)> gives);

  /// Waits until everything is there, and everything given is gone.
  void finish();

  /// wants(peer) of `peer`'s block; valid after finish().
  std::span<const std::byte> from(int peer) const { return parts_[static_cast<std::size_t>(peer)]; }

 private:
  const Operation& operation_;
  std::pmr::vector<std::span<const std::byte>> parts_;
  Block received_;
  Transfers transfers_;
};

/// An operation in which every rank shows a block and reads all of everyone's.
///   show : fills a block and shows it; what it throws on a rank, every rank throws
///   use  : gets what all have shown; whoever throws there what all ranks find alike completes the operation before
/// Collective. Throws Error: as Operation::meet. Cost: one meeting, and one read of each block.
void share(const Communicator& communicator, const Signature& signature,
           FunctionRef<Operation::Words(const Operation&, Block&)> show,
           FunctionRef<void(Operation&, const Reading&)> use);

}  // namespace expar
