// Which backend a test runs on that is not about backends.
#pragma once

#include <algorithm>
#include <string>

#include <expar/registry.h>

namespace expar::test {

/// The one that users get, where this build has it.
inline std::string fastest_backend() {
  const auto all = available_backends();
  return std::find(all.begin(), all.end(), "cpu") != all.end() ? "cpu" : "reference";
}

}  // namespace expar::test
