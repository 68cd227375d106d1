// Copies of rows: the one place that knows how to store them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace expar {

/// How bytes are stored: through the cache, by the processor's string copy, or past the cache.
enum class Store : std::uint8_t { cached, string, streaming };
inline constexpr int kStores = 3;

/// Row `rows[i]` of `from` goes to row i of `to`. Streaming stores are made visible by the next publish.
void copy_rows(std::byte* to, const std::byte* from, std::span<const std::int32_t> rows, std::size_t row_bytes,
               Store store);

}  // namespace expar
