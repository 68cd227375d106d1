// Numbers that every rank tells all others.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include <expar/context.h>
#include <expar/operation.h>

namespace expar {

/// Every rank's bytes, in rank order. `bytes` [P] is how many each rank tells, as all know; `prepare` may throw, and
/// then every rank throws its error.
std::vector<std::byte> exchange_bytes(const Context& context, const Signature& signature,
                                      FunctionRef<std::span<const std::byte>()> prepare,
                                      std::span<const std::size_t> bytes);

/// The same for numbers: `counts` [P] of them; `prepare` returns this rank's.
template <class T, class Prepare>
std::vector<T> exchange(const Context& context, const Signature& signature, std::span<const std::size_t> counts,
                        Prepare prepare) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::vector<std::size_t> bytes;
  for (const std::size_t count : counts) bytes.push_back(count * sizeof(T));
  std::vector<T> mine;
  const auto all = exchange_bytes(
      context, signature,
      [&] {
        mine = prepare();
        return std::as_bytes(std::span<const T>(mine));
      },
      bytes);
  std::vector<T> values(all.size() / sizeof(T));
  if (!all.empty()) std::memcpy(values.data(), all.data(), all.size());
  return values;
}

}  // namespace expar
