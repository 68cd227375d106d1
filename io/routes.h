// Recorded routing: which experts a router chose for each token, in each of its layers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace expar::io {

/// One layer of a *.routes.gz file.
struct Routes {
  std::int64_t tokens = 0;
  std::int64_t topk = 0;
  std::int64_t experts = 0;
  std::vector<std::int32_t> ids;  // [tokens, topk], each in [0, experts)
};

/// Reads layer `layer` of `path`: gzip of one line of JSON (layers, tokens, top_k, experts), then uint8
/// ids[layers][tokens][top_k], then weights that are not read here.
/// Throws Error: io (cannot be read, is cut short), bad_argument (no such layer, or not of this format; it says where).
Routes read_routes(const std::string& path, std::int64_t layer);

}  // namespace expar::io
