// Bounds the rows of each expert, between the router's choice and the plan: what is beyond is dropped, goes elsewhere,
// waits for a second plan, or is an error.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include <expar/context.h>
#include <expar/router.h>

namespace expar {

/// What becomes of slots that their expert has no room for. Positions count in global token order, slots in theirs.
enum class CapacityPolicy : std::uint8_t {
  none,              // there is no bound
  drop_by_position,  // the first rows stay
  drop_by_score,     // the rows of the largest Routing::top stay, of equal ones the first
  reroute,           // to the token's next choice by Routing::choice_scores that has room and that it does not use yet
  overflow,          // the first rows stay; the others are kept aside, for a second plan
  error,
};

/// "drop_by_position" and so on: the names as they stand there.
std::string_view name(CapacityPolicy policy);
/// Throws Error: bad_argument (not one of the names, with the list of them).
CapacityPolicy parse_capacity_policy(std::string_view name);

enum class CapacityScope : std::uint8_t {
  global,    // an expert takes so many rows of all ranks together: the result does not depend on P
  per_rank,  // so many of each rank, by that rank's own tokens
};

struct CapacityOptions {
  CapacityPolicy policy = CapacityPolicy::none;
  CapacityScope scope = CapacityScope::global;
  /// An expert takes ceil((T K / E) factor) rows, computed in double, T being the tokens of the scope without padding;
  /// or `rows`, whichever is given.
  double factor = 0;
  std::int64_t rows = 0;
};

/// Throws Error: bad_argument (a policy without a bound, a bound without a policy, both bounds, a bound that is not
/// above 0), naming the value.
void validate(const CapacityOptions& options);

/// What a bound left of a choice. Counts are over all ranks and the same on each; every slot of `chosen` is in the plan
/// of `ids`, dropped or aside. Reuse one object: it keeps its memory.
struct Capacity {
  std::int64_t rows = 0;                 // that an expert takes, of the scope's ranks together
  Tensor ids;                            // [T, K] int32 for make_plan; -1 where a slot was dropped or set aside
  Tensor weights;                        // [T, K] f32: the router's, 0 where ids is -1; absent with reroute
  Tensor overflow_ids;                   // [T, K] int32, overflow only: the slots set aside, -1 elsewhere
  std::vector<std::int64_t> chosen;      // [E] slots that the router gave each expert
  std::vector<std::int64_t> dropped;     // [E] of those, no expert takes
  std::vector<std::int64_t> rerouted;    // [E] of those, another expert takes
  std::vector<std::int64_t> overflowed;  // [E] of those, are set aside
  Buffer memory;
};

/// Bounds the rows of each expert.
///   ids     : [T, K] int32 in [-1, E): Routing::ids, less those that are for none of the experts here; T may differ
///   per
///             rank. Not changed, but with policy none they become Capacity::ids.
///   routing : of the same tokens, as route() left it. It is not changed, so that route_backward goes through the
///             router's own choice, with dweights 0 for what was dropped. Where slots went elsewhere (reroute), or the
///             weights of the kept ones are to be normalised anew, call route() again with RouteInputs::ids =
///             Capacity::ids.
///   experts : E; Routing::choice_scores may have columns beyond, to which nothing is re-routed
/// Reroute goes in rounds: what an expert has no room for asks for its token's next choice, all at once, again by
/// position. A slot is dropped for good only if no expert of the token's groups is left that has room and that the
/// token does not use. Collective, except for policy none, which only returns the router's choice (with chosen, dropped
/// and rerouted empty).
/// Throws Error: bad_argument (options; shapes or dtypes; an id that is no expert; with policy error "expert 3 is given
/// 41 rows, its capacity is 32"), no_memory, mismatch, timeout, peer_lost, internal: the same on every rank, and after
/// the first three the communicator stays usable. Cost: one exchange of E + 1 integers per rank; of the
/// scores of overfull experts besides (drop_by_score); of E more integers for each round, and once at the end
/// (reroute). Source: by position as GShard (Lepikhin et al. 2020), by score as V-MoE (Riquelme et al. 2021).
void bound_rows(const Context& context, const CapacityOptions& options, std::int64_t experts, Tensor ids,
                const Routing& routing, Capacity& capacity);

}  // namespace expar
