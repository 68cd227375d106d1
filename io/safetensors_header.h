// The header of a safetensors file as text: parsing, the rules that it must keep, and writing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <expar/tensor.h>

namespace expar::io {

/// More is refused before it is read (the limit of the reference implementation).
inline constexpr std::uint64_t kMaxHeader = 100'000'000;

/// A dtype of the format. expar has only some of them.
struct StoredDType {
  std::string_view name;
  unsigned bits = 0;
  std::optional<DType> dtype;
};
/// In the order in which a writer must not place them: the last, with the strictest alignment, come first in a file.
std::span<const StoredDType> stored_dtypes();
std::size_t stored_dtype(DType dtype);

struct HeaderEntry {
  std::string name;
  std::size_t dtype = 0;  // a row of stored_dtypes()
  std::vector<std::int64_t> extents;
  std::uint64_t begin = 0, end = 0;  // bytes, from the end of the header
};

struct Header {
  std::vector<HeaderEntry> entries;  // by name
  std::map<std::string, std::string> metadata;
};

/// Parses and checks the header `text` of a file with `data_bytes` bytes after it.
/// Throws Error: io, beginning with `path`.
Header parse_header(std::string_view text, std::uint64_t data_bytes, const std::string& path);

/// The header with its length before it and padded to whole 8 bytes; entries stand as they are given.
std::string format_header(std::span<const HeaderEntry> entries, const std::map<std::string, std::string>& metadata);

}  // namespace expar::io
