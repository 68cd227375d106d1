// Micro-shards as Python leaves them out.
#include <string>

#include "python/src/bind.h"

namespace expar::python {

std::vector<std::int64_t> shards_of(const std::optional<std::vector<std::int64_t>>& given, std::int64_t tokens) {
  if (!given) return {0, tokens};
  bool fine = !given->empty() && given->front() == 0 && given->back() == tokens;
  for (std::size_t s = 1; fine && s < given->size(); ++s) fine = (*given)[s - 1] <= (*given)[s];
  if (!fine) {
    throw Error(ErrorCode::bad_argument, "shards should ascend from 0 to the " + std::to_string(tokens) + " tokens");
  }
  return *given;
}

}  // namespace expar::python
