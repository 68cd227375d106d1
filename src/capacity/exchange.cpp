// Numbers that every rank tells all others, in one operation.
#include "src/capacity/exchange.h"

#include "src/util/shown.h"

namespace expar {

std::vector<std::byte> exchange_bytes(const Context& context, const Signature& signature,
                                      FunctionRef<std::span<const std::byte>()> prepare,
                                      std::span<const std::size_t> bytes) {
  const Communicator& communicator = context.communicator();
  Operation operation(communicator, signature, context.timeout());
  Block block;
  operation.ready([&] {
    const std::span<const std::byte> mine = prepare();
    block = communicator.arena().allocate(mine.size());
    if (!mine.empty()) std::memcpy(block.data(), mine.data(), mine.size());
    return show(block);
  });
  operation.meet();
  block.used_by(operation.sequence());
  std::vector<Slice> wants;
  for (const std::size_t count : bytes) wants.push_back({0, count});
  const std::vector<Slice> gives(bytes.size(), Slice{0, block.size()});
  Reading reading(communicator, operation, block, wants, gives);
  reading.finish(communicator, operation);
  std::vector<std::byte> all;
  for (int rank = 0; rank < context.size(); ++rank) {
    const auto part = reading.from(rank);
    all.insert(all.end(), part.begin(), part.end());
  }
  operation.complete();
  return all;
}

}  // namespace expar
