// Where tokens go in a benchmark: drawn from a distribution, or recorded from a real router.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bench/bench.h"

namespace expar::bench {

/// What --routes says.
struct RouteSource {
  enum class Kind { uniform, zipf, hot, file };
  Kind kind = Kind::uniform;
  double skew = 0;       // zipf: the exponent
  std::int64_t hot = 0;  // hot: how many experts are hot
  double hot_share = 0;  // hot: how likely a token's first choice is one of them
  std::string path;
};

/// Throws Error: bad_argument (naming the value and the forms that there are).
RouteSource parse_routes(const std::string& text);

/// ids [tokens, topk] of the first `tokens` tokens of all ranks together: the experts of a token differ from each
/// other. A file that has fewer tokens starts again. The same on every rank.
std::vector<std::int32_t> make_routes(const Options& options, std::int64_t tokens);

}  // namespace expar::bench
