// What each policy does with the slots that an expert has no room for. `ids` [T, K] are this rank's and lose them.
#pragma once

#include <cstdint>
#include <span>

#include <expar/router.h>

#include "src/capacity/requests.h"

namespace expar {

/// The first `rows` requests of each expert stay.
void keep_first(const Requests& requests, std::int64_t rows, std::span<std::int32_t> ids);

/// Order-preserving: a larger score has a larger key; what is no number has the least.
std::uint32_t key_of(float score);

/// Those of the largest score stay. `tell` tells the keys of one rank's requests of the experts that have more than
/// `rows`, expert by expert, by position, to all ranks of the scope, and returns all ranks' in rank order.
void keep_best(const Requests& requests, std::int64_t rows, const Routing& routing, std::span<std::int32_t> ids,
               FunctionRef<std::vector<std::uint32_t>(std::vector<std::uint32_t>)> tell);

/// What an expert has no room for asks for its token's next choice. `tell` tells one rank's requests [E] to all ranks
/// of the scope, and returns all ranks'.
void reroute(Requests requests, std::int64_t rows, const Routing& routing, std::span<std::int32_t> ids,
             FunctionRef<std::vector<std::int64_t>(std::vector<std::int64_t>)> tell);

}  // namespace expar
