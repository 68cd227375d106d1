// Bounds the rows of each expert: agrees on who asks for how much, lets the policy choose, and counts what was lost.
#include <expar/capacity.h>

#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include <expar/operation.h>

#include "src/capacity/exchange.h"
#include "src/capacity/policies.h"
#include "src/util/check.h"

namespace expar {
namespace {

void check(const CapacityOptions& options, std::int64_t experts, const Tensor& ids, const Routing& routing) {
  validate(options);
  if (experts < 1) refuse("experts is " + std::to_string(experts) + ", must be at least 1");
  if (ids.dtype() != DType::int32 || ids.shape().rank() != 2 || ids.size(1) < 1) {
    refuse("ids is " + shown(ids) + ", should be int32 [T, K]");
  }
  require("routing.weights", routing.weights, DType::f32, ids.shape());
  if (routing.valid < 0 || routing.valid > ids.size(0)) {
    refuse("routing.valid is " + std::to_string(routing.valid) + ", of " + std::to_string(ids.size(0)) + " tokens");
  }
  if (options.policy == CapacityPolicy::drop_by_score) require("routing.top", routing.top, DType::f32, ids.shape());
  if (options.policy == CapacityPolicy::reroute) {
    const Shape& shape = routing.choice_scores.shape();
    require("routing.choice_scores", routing.choice_scores, DType::f32,
            {ids.size(0), shape.rank() == 2 ? std::max(shape[1], experts) : experts});
  }
  require_experts("ids", ids, experts);
}

std::int64_t rows_for(const CapacityOptions& options, std::int64_t tokens, std::int64_t topk, std::int64_t experts) {
  if (options.rows > 0) return options.rows;
  const auto slots = static_cast<double>(tokens * topk);
  return static_cast<std::int64_t>(std::min(slots, std::ceil(slots / static_cast<double>(experts) * options.factor)));
}

/// What every rank asks for, as all ranks know it.
struct Demand {
  std::int64_t experts = 0, topk = 0;
  int rank = 0;
  CapacityOptions options;
  std::vector<std::int64_t> counts;  // [P, E]
  std::vector<std::int64_t> tokens;  // [P]

  bool global() const { return options.scope == CapacityScope::global; }
  int ranks() const { return static_cast<int>(tokens.size()); }

  /// The requests of the scope that a rank belongs to, and how many rows they share.
  Requests requests(int of) const {
    if (global()) return {experts, counts, of};
    const auto row = counts.begin() + of * experts;
    return {experts, {row, row + experts}, 0};
  }
  std::int64_t rows(int of) const {
    std::int64_t sum = global() ? 0 : tokens[at(of)];
    for (int r = 0; global() && r < ranks(); ++r) sum += tokens[at(r)];
    return rows_for(options, sum, topk, experts);
  }
};

Demand exchange_demand(const Context& context, const CapacityOptions& options, std::int64_t experts, const Tensor& ids,
                       const Routing& routing) {
  Demand demand{experts, ids.shape().rank() == 2 ? ids.size(1) : 0, context.rank(), options, {}, {}};
  const std::size_t row = at(std::max<std::int64_t>(experts, 0)) + 1;
  Signature signature("bound_rows");
  signature.with("experts", experts).with("topk", demand.topk);
  signature.with("policy", static_cast<std::int64_t>(options.policy));
  signature.with("scope", static_cast<std::int64_t>(options.scope));
  signature.with("rows", options.rows).with("factor's bits", std::bit_cast<std::int64_t>(options.factor));
  const std::vector<std::size_t> sizes(at(context.size()), row);
  const auto all = exchange<std::int64_t>(context, signature, sizes, [&] {
    check(options, experts, ids, routing);
    auto mine = counts_of({ids.as<std::int32_t>(), at(ids.elements())}, experts);
    mine.push_back(routing.valid);
    return mine;
  });
  for (int r = 0; r < context.size(); ++r) {
    const auto begin = all.begin() + r * (experts + 1);
    const auto sane = [](std::int64_t count) {
      return count >= 0 && count <= std::numeric_limits<std::int32_t>::max();
    };
    if (!std::all_of(begin, begin + experts + 1, sane)) {
      context.communicator().blame(r, "bound_rows", "sent counts that cannot be");
    }
    demand.counts.insert(demand.counts.end(), begin, begin + experts);
    demand.tokens.push_back(begin[experts]);
  }
  return demand;
}

/// [E] slots beyond the bound, over all scopes.
std::vector<std::int64_t> excess_of(const Demand& demand) {
  std::vector<std::int64_t> excess(at(demand.experts));
  for (int r = 0; r < (demand.global() ? 1 : demand.ranks()); ++r) {
    const Requests requests = demand.requests(r);
    for (std::int64_t e = 0; e < demand.experts; ++e)
      excess[at(e)] += std::max<std::int64_t>(0, requests.total(e) - demand.rows(r));
  }
  return excess;
}

/// The first expert that is given too much, as every rank knows it.
[[noreturn]] void refuse_excess(const Communicator& communicator, const Demand& demand) {
  for (int r = 0;; ++r) {
    const Requests requests = demand.requests(r);
    for (std::int64_t e = 0; e < demand.experts; ++e) {
      if (requests.total(e) <= demand.rows(r)) continue;
      communicator.throw_alike(Error(
          ErrorCode::bad_argument,
          "expert " + std::to_string(e) + " is given " + std::to_string(requests.total(e)) + " rows" +
              (demand.global() ? "" : " by rank " + std::to_string(communicator.job_rank(r))) + ", its capacity is " +
              std::to_string(demand.rows(r)) + ": raise it, or choose a policy that drops or re-routes",
          {.rank = demand.global() ? -1 : r, .operation = "bound_rows"}));
    }
  }
}

void lay_out(const Shape& shape, CapacityPolicy policy, Capacity& capacity) {
  const std::int64_t n = shape.elements();
  auto* words = capacity.memory.view(DType::int32, {3 * n}).as<std::int32_t>();
  capacity.ids = Tensor(words, shape);
  capacity.weights = policy == CapacityPolicy::reroute ? Tensor() : Tensor(words + n, DType::f32, shape);
  capacity.overflow_ids = policy == CapacityPolicy::overflow ? Tensor(words + 2 * n, shape) : Tensor();
}

/// Tells the scope's other ranks this rank's numbers of each expert; a rank alone is told its own.
template <class T>
auto teller(const Context& context, const Demand& demand, const Signature& signature, std::vector<std::size_t> sizes) {
  return [&context, &demand, signature, sizes = std::move(sizes)](std::vector<T> mine) {
    if (!demand.global()) return mine;
    return exchange<T>(context, signature, sizes, [&] { return mine; });
  };
}

/// How many keys each rank has to tell: those of its requests of overfull experts.
std::vector<std::size_t> keys_of(const Demand& demand) {
  const Requests requests = demand.requests(0);
  std::vector<std::size_t> sizes(at(requests.ranks()));
  for (std::int64_t e = 0; e < demand.experts; ++e) {
    if (requests.total(e) <= demand.rows(0)) continue;
    for (int r = 0; r < requests.ranks(); ++r) sizes[at(r)] += at(requests.of(r, e));
  }
  return sizes;
}

void apply(const Context& context, const Demand& demand, const Routing& routing, std::span<std::int32_t> ids) {
  const Requests requests = demand.requests(demand.rank);
  const std::int64_t rows = demand.rows(demand.rank);
  switch (demand.options.policy) {
    case CapacityPolicy::drop_by_score:
      return keep_best(requests, rows, routing, ids,
                       teller<std::uint32_t>(context, demand, Signature("bound_rows scores"), keys_of(demand)));
    case CapacityPolicy::reroute:
      return reroute(
          requests, rows, routing, ids,
          teller<std::int64_t>(context, demand, Signature("bound_rows round").with("experts", demand.experts),
                               std::vector<std::size_t>(at(context.size()), at(demand.experts))));
    default:
      return keep_first(requests, rows, ids);
  }
}

/// [E] slots that no expert takes, by the expert that the router chose, over all ranks.
std::vector<std::int64_t> lost_of(const Context& context, const Demand& demand, std::span<const std::int32_t> chosen,
                                  std::span<const std::int32_t> ids) {
  std::vector<std::int64_t> mine(at(demand.experts)), lost(at(demand.experts));
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (chosen[i] >= 0 && ids[i] < 0) ++mine[at(chosen[i])];
  const std::vector<std::size_t> sizes(at(context.size()), at(demand.experts));
  const auto all = exchange<std::int64_t>(context, Signature("bound_rows lost").with("experts", demand.experts), sizes,
                                          [&] { return mine; });
  for (std::size_t i = 0; i < all.size(); ++i) lost[i % lost.size()] += all[i];
  return lost;
}

constexpr std::string_view kNames[] = {"none", "drop_by_position", "drop_by_score", "reroute", "overflow", "error"};

}  // namespace

std::string_view name(CapacityPolicy policy) { return kNames[static_cast<std::size_t>(policy)]; }

CapacityPolicy parse_capacity_policy(std::string_view name) {
  std::string known;
  for (std::size_t i = 0; i < std::size(kNames); ++i) {
    if (kNames[i] == name) return static_cast<CapacityPolicy>(i);
    known += (i == 0 ? "" : ", ") + std::string(kNames[i]);
  }
  refuse("capacity policy '" + std::string(name) + "' is none of " + known);
}

void validate(const CapacityOptions& options) {
  const bool none = options.policy == CapacityPolicy::none;
  if (!(std::isfinite(options.factor) && options.factor >= 0)) {
    refuse("the capacity factor is " + std::to_string(options.factor) + ", must be a number above 0");
  }
  if (options.rows < 0) refuse("the capacity is " + std::to_string(options.rows) + " rows, must be at least 1");
  if (options.factor > 0 && options.rows > 0) {
    refuse("a capacity is a factor (" + std::to_string(options.factor) + ") or rows (" + std::to_string(options.rows) +
           "), not both");
  }
  const bool bound = options.factor > 0 || options.rows > 0;
  if (none && bound) refuse("a capacity needs a policy for the rows beyond it");
  if (!none && !bound) refuse("a capacity policy needs a factor or rows");
}

void bound_rows(const Context& context, const CapacityOptions& options, std::int64_t experts, Tensor ids,
                const Routing& routing, Capacity& capacity) {
  if (options.policy == CapacityPolicy::none) {
    validate(options);
    capacity.rows = 0;
    capacity.ids = ids;
    capacity.weights = routing.weights;
    capacity.overflow_ids = Tensor();
    for (auto* counts : {&capacity.chosen, &capacity.dropped, &capacity.rerouted, &capacity.overflowed})
      counts->clear();
    return;
  }
  const Phase phase(context.trace(), operation_span("bound_rows"));
  const Demand demand = exchange_demand(context, options, experts, ids, routing);
  const std::vector<std::int64_t> excess = excess_of(demand);
  const bool over = std::any_of(excess.begin(), excess.end(), [](std::int64_t count) { return count > 0; });
  if (over && options.policy == CapacityPolicy::error) refuse_excess(context.communicator(), demand);

  lay_out(ids.shape(), options.policy, capacity);
  capacity.rows = demand.rows(context.rank());
  const std::span<const std::int32_t> chosen(ids.as<std::int32_t>(), at(ids.elements()));
  const std::span<std::int32_t> kept(capacity.ids.as<std::int32_t>(), chosen.size());
  std::copy(chosen.begin(), chosen.end(), kept.begin());
  if (over) apply(context, demand, routing, kept);

  for (std::size_t i = 0; i < kept.size() && !capacity.weights.absent(); ++i)
    capacity.weights.as<float>()[i] = kept[i] < 0 ? 0.0F : routing.weights.as<float>()[i];
  for (std::size_t i = 0; i < kept.size() && !capacity.overflow_ids.absent(); ++i)
    capacity.overflow_ids.as<std::int32_t>()[i] = kept[i] < 0 ? chosen[i] : -1;

  const std::vector<std::int64_t> zero(at(experts));
  capacity.chosen = zero;
  for (std::size_t i = 0; i < demand.counts.size(); ++i) capacity.chosen[i % zero.size()] += demand.counts[i];
  capacity.dropped = capacity.rerouted = capacity.overflowed = zero;
  if (options.policy == CapacityPolicy::overflow) {
    capacity.overflowed = excess;
  } else if (options.policy != CapacityPolicy::reroute || !over) {
    capacity.dropped = excess;
  } else {
    capacity.dropped = lost_of(context, demand, chosen, kept);
    for (std::size_t e = 0; e < zero.size(); ++e) capacity.rerouted[e] = excess[e] - capacity.dropped[e];
  }
}

}  // namespace expar
