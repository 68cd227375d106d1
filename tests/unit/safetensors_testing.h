// What the tests of files share: what an operation on them says, and files of any header.
#pragma once

#include <functional>
#include <string>

#include <expar/error.h>

#include "tests/directory.h"

namespace expar {

/// "io: ..." as it was thrown, with the directory's path left out; "accepted" if nothing was.
inline std::string refusal_of(const Directory& directory, const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    std::string text = std::string(name(error.code())) + ": " + error.message();
    const std::string prefix = directory.path() + "/";
    for (std::size_t at = 0; (at = text.find(prefix, at)) != std::string::npos;) text.erase(at, prefix.size());
    return text;
  }
  return "accepted";
}

/// A safetensors file of a header as it stands and bytes after it.
inline std::string file_of(const std::string& header, std::size_t data_bytes) {
  std::string file;
  for (std::size_t i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> (8 * i));
  return file + header + std::string(data_bytes, 'x');
}

}  // namespace expar
