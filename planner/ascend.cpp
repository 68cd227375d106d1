// The ranges of the page.
#include "planner/ascend.h"

#include <expar/error.h>

namespace expar::planner {

std::vector<std::string> ascend_refusals(const AscendSizes& sizes) {
  std::vector<std::string> refusals;
  try {
    sizes.domain.check();
  } catch (const Error& error) {
    refusals.push_back(error.message());
  }
  const auto bound = [&](const char* what, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value >= least && value <= most) return;
    refusals.push_back(std::string(what) + " is " + std::to_string(value) + ", should be from " +
                       std::to_string(least) + " to " + std::to_string(most));
  };
  bound("BS", sizes.tokens, 1, 512);
  bound("H", sizes.hidden, 1024, 8192);
  bound("K", sizes.topk, 1, 16);
  return refusals;
}

}  // namespace expar::planner
