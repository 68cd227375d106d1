// How every offset of a plan follows from the counts of all ranks.
#include "src/dispatch/plan_data.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "src/util/check.h"
#include "src/util/mix.h"

namespace expar {
namespace {

/// Reads what rank `source` says of its rows; a rank can send no more rows to a rank than it has slots there.
void take_counts(const Operation& operation, int source, std::span<const std::byte> bytes, Plan::Data& plan,
                 std::pmr::vector<std::int32_t>& unique) {
  auto* counts = plan.counts.data() + at(source) * at(plan.experts);
  auto* unique_counts = unique.data() + at(source) * at(plan.ranks);
  std::memcpy(counts, bytes.data(), at(plan.experts) * sizeof *counts);
  std::memcpy(unique_counts, bytes.data() + at(plan.experts) * sizeof *counts, at(plan.ranks) * sizeof *unique_counts);
  bool sane = true;
  for (int d = 0; d < plan.ranks; ++d) {
    const ExpertRange range = plan.held_by(d);
    std::int64_t slots = 0;
    for (std::int64_t e = range.first; e < range.first + range.count; ++e) {
      sane = sane && counts[e] >= 0;
      slots += counts[e];
    }
    sane = sane && unique_counts[d] >= 0 && unique_counts[d] <= slots && (d != source || unique_counts[d] == 0);
  }
  if (!sane) operation.communicator().blame(source, operation.name(), "sent counts that cannot be");
}

/// The first outbox row of each expert of `owner`, and one past the last row.
template <class Write>
std::int64_t lay_out(const Plan::Data& plan, int owner, Write write) {
  const ExpertRange range = plan.held_by(owner);
  std::int64_t row = 0;
  for (std::int64_t e = range.first; e < range.first + range.count; ++e) {
    write(e, row);
    row += (plan.totals[at(e)] + plan.alignment - 1) / plan.alignment * plan.alignment;
  }
  return row;
}

void derive_offsets(Plan::Data& plan, const std::pmr::vector<std::int32_t>& unique) {
  const std::int64_t experts = plan.experts;
  plan.totals.assign(at(experts), 0);
  std::pmr::vector<std::int64_t> before(at(experts), 0, plan.memory.get());  // rows of ranks below this one
  for (int s = 0; s < plan.ranks; ++s) {
    const auto* counts = plan.counts.data() + at(s) * at(experts);
    if (s == plan.rank) before = plan.totals;
    for (std::int64_t e = 0; e < experts; ++e) plan.totals[at(e)] += counts[e];
  }
  plan.slot_start.assign(at(experts) + 1, 0);
  for (int owner = 0; owner < plan.ranks; ++owner) {
    lay_out(plan, owner, [&](std::int64_t e, std::int64_t row) {
      plan.slot_start[at(e + 1)] = static_cast<std::int32_t>(row + before[at(e)]);
    });
  }

  const ExpertRange local = plan.held_by(plan.rank);
  plan.offsets.resize(at(local.count) + 1);
  plan.rows.resize(at(local.count));
  plan.offsets.back() = lay_out(plan, plan.rank, [&](std::int64_t e, std::int64_t row) {
    plan.offsets[at(e - local.first)] = row;
    plan.rows[at(e - local.first)] = plan.totals[at(e)];
  });
  plan.source_start.resize(at(plan.ranks) * at(local.count));
  for (std::int64_t e = 0; e < local.count; ++e) {
    std::int64_t row = plan.offsets[at(e)];
    for (int s = 0; s < plan.ranks; ++s) {
      plan.source_start[at(s) * at(local.count) + at(e)] = row;
      row += plan.counts[at(s) * at(experts) + at(local.first + e)];
    }
  }

  plan.sources.assign(at(plan.ranks) + 1, 0);
  plan.send_row.assign(at(plan.ranks), 0);
  for (int s = 0; s < plan.ranks; ++s) {
    const auto* to = unique.data() + at(s) * at(plan.ranks);
    plan.sources[at(s + 1)] = plan.sources[at(s)] + to[plan.rank];
    for (int d = 0; s < plan.rank && d < plan.ranks; ++d) plan.send_row[at(d)] += to[d];
  }
}

/// From the place among this rank's rows of an expert to the place among all its rows.
void place_slots(Plan::Data& plan) {
  const auto* start = plan.slot_start.data() + 1;
  for (std::size_t i = 0; i < plan.slots.size(); ++i) plan.slots[i].row += start[plan.ids[i]];
}

}  // namespace

void Plan::Data::reserve() {
  const std::size_t most = at(bound * topk);
  ids.reserve(most);
  slots.reserve(most);
  send_tokens.reserve(most);
}

void count(ConstTensor ids, const PlanOptions& options, Plan::Data& plan) {
  plan.tokens = ids.size(0);
  plan.topk = ids.size(1);
  plan.experts = options.experts;
  plan.alignment = options.alignment;
  plan.reserve();
  plan.first_experts.resize(at(plan.ranks) + 1);
  for (int r = 0; r <= plan.ranks; ++r) {
    const bool named = !options.first_experts.empty();
    plan.first_experts[at(r)] = named ? options.first_experts[at(r)] : experts_of(r, plan.ranks, plan.experts).first;
  }
  plan.ids.assign(ids.as<std::int32_t>(), ids.as<std::int32_t>() + ids.elements());

  // Slot -1 is an expert too, the one before the first, on a rank before the first: no branch to mispredict.
  std::pmr::vector<SlotRow> next(at(plan.experts) + 1, plan.memory.get());
  for (int owner = 0; owner < plan.ranks; ++owner) {
    const ExpertRange range = plan.held_by(owner);
    for (std::int64_t e = range.first; e < range.first + range.count; ++e) next[at(e + 1)].rank = owner;
  }
  std::pmr::vector<std::int32_t> last(at(plan.ranks) + 1, -1, plan.memory.get());  // the token last seen to need a rank
  // What is sent, in token order; one more is written than there is.
  const std::size_t most = plan.ids.capacity() + 1;
  std::pmr::vector<std::int32_t> destination(most, plan.memory.get());
  std::pmr::vector<std::int32_t> token_of(most, plan.memory.get());
  plan.slots.resize(plan.ids.size());
  std::size_t sends = 0;
  std::size_t i = 0;
  for (std::int32_t t = 0; t < plan.tokens; ++t) {
    last[0] = last[at(plan.rank + 1)] = t;  // neither is sent to
    for (std::int64_t k = 0; k < plan.topk; ++k, ++i) {
      SlotRow& slot = next[at(plan.ids[i] + 1)];
      std::int32_t& seen = last[at(slot.rank + 1)];
      destination[sends] = slot.rank;
      token_of[sends] = t;
      sends += seen != t;
      seen = t;
      plan.slots[i] = slot;
      ++slot.row;
    }
  }
  plan.own.assign(at(plan.experts + plan.ranks), 0);
  for (std::int64_t e = 0; e < plan.experts; ++e) plan.own[at(e)] = next[at(e + 1)].row;
  std::int32_t* const unique_counts = plan.own.data() + plan.experts;
  for (i = 0; i < sends; ++i) ++unique_counts[destination[i]];
  plan.send_begin.assign(at(plan.ranks) + 1, 0);
  for (int d = 0; d < plan.ranks; ++d) plan.send_begin[at(d + 1)] = plan.send_begin[at(d)] + unique_counts[d];
  std::pmr::vector<std::int64_t> end(plan.send_begin.begin(), plan.send_begin.end() - 1, plan.memory.get());
  plan.send_tokens.resize(sends);
  for (i = 0; i < sends; ++i) plan.send_tokens[at(end[at(destination[i])]++)] = token_of[i];
}

void complete(const Operation& operation, const Reading& counted, Plan::Data& plan) {
  const std::size_t ranks = at(plan.ranks);
  plan.id = operation.number();
  plan.counts.resize(ranks * at(plan.experts));
  std::pmr::vector<std::int32_t> unique(ranks * ranks, plan.memory.get());
  for (int s = 0; s < plan.ranks; ++s) take_counts(operation, s, counted.from(s), plan, unique);
  derive_offsets(plan, unique);
  place_slots(plan);
}

void complete_replicated(Plan::Data& plan) {
  std::uint64_t id = mix(mix(mix(at(plan.topk), at(plan.experts)), at(plan.alignment)), at(plan.tokens));
  for (const std::int64_t first : plan.first_experts) id = mix(id, at(first));
  for (const std::int32_t expert : plan.ids) id = mix(id, static_cast<std::uint64_t>(expert));
  plan.id = id >> 2 | std::uint64_t{1} << 62;  // no number of an operation

  // For offsets, each row counts once: as if the last rank alone had them, so that nobody's stand before another's.
  const std::size_t experts = at(plan.experts), last = at(plan.ranks - 1);
  plan.counts.assign(at(plan.ranks) * experts, 0);
  std::copy_n(plan.own.begin(), experts, plan.counts.begin() + static_cast<std::ptrdiff_t>(last * experts));
  derive_offsets(plan, std::pmr::vector<std::int32_t>(at(plan.ranks) * at(plan.ranks), 0, plan.memory.get()));
  place_slots(plan);
  for (std::size_t s = 0; s < last; ++s) {
    std::copy_n(plan.own.begin(), experts, plan.counts.begin() + static_cast<std::ptrdiff_t>(s * experts));
  }
}

}  // namespace expar
