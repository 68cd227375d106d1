// Numbers that every rank tells all others, in one operation.
#include "src/capacity/exchange.h"

#include <string>

#include "src/util/shown.h"

namespace expar {

std::vector<std::byte> exchange_bytes(const Context& context, const Signature& signature,
                                      FunctionRef<std::span<const std::byte>()> prepare,
                                      std::span<const std::size_t> bytes) {
  std::vector<std::byte> all;
  share(
      context.communicator(), signature,
      [&](const Operation& operation, Block& block) { return show_copy(operation, block, prepare()); },
      [&](const Operation& operation, const Reading& reading) {
        for (int rank = 0; rank < context.size(); ++rank) {
          const auto part = reading.from(rank);
          const std::size_t wanted = bytes[static_cast<std::size_t>(rank)];
          if (part.size() != wanted) {
            context.communicator().blame(
                rank, operation.name(),
                "told " + std::to_string(part.size()) + " bytes where " + std::to_string(wanted) + " are due");
          }
          all.insert(all.end(), part.begin(), part.end());
        }
      });
  return all;
}

}  // namespace expar
