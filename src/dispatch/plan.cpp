// Plan: counts rows, exchanges the counts, and derives every offset from them.
#include <expar/plan.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "src/util/shown.h"

namespace expar {

struct Plan::Data {
  explicit Data(std::shared_ptr<std::pmr::memory_resource> m) : memory(std::move(m)) {}

  std::shared_ptr<std::pmr::memory_resource> memory;
  int rank = 0, ranks = 1;
  std::int64_t tokens = 0, topk = 0, experts = 0, alignment = 1;
  std::uint64_t id = 0;
  std::pmr::vector<std::int32_t> ids{memory.get()};          // [T, K]
  std::pmr::vector<std::int32_t> send_tokens{memory.get()};  // destination by destination
  std::vector<std::int64_t> send_begin;                      // [P + 1] into send_tokens
  std::vector<std::int64_t> send_row;                        // [P]
  std::pmr::vector<std::int32_t> counts{memory.get()};       // [P, E]
  std::vector<std::int64_t> totals;                          // [E]
  std::vector<std::int64_t> offsets;                         // [L + 1]
  std::vector<std::int64_t> rows;                            // [L]
  std::vector<std::int64_t> sources;                         // [P + 1]
  std::vector<std::int32_t> slot_start;                      // [1 + E], from expert -1
  std::vector<std::int64_t> source_start;                    // [P, L]
  std::pmr::vector<SlotRow> slots{memory.get()};             // [T, K]
};

namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::bad_argument, message); }

void validate(ConstTensor ids, const PlanOptions& options) {
  if (options.failure) throw *options.failure;
  if (options.experts < 1) refuse("num_experts is " + std::to_string(options.experts) + ", below 1");
  if (options.alignment < 1) refuse("alignment is " + std::to_string(options.alignment) + ", below 1");
  if (ids.dtype() != DType::int32 || ids.shape().rank() != 2) {
    refuse("ids are " + std::string(name(ids.dtype())) + " " + ids.shape().str() + ", not int32 [T, K]");
  }
  if (ids.elements() > std::numeric_limits<std::int32_t>::max())
    refuse("ids " + ids.shape().str() + " are more slots than 2^31 - 1");
  const std::span<const std::int32_t> all(ids.as<std::int32_t>(), at(ids.elements()));
  bool wrong = false;
  for (const std::int32_t id : all) wrong |= (id < -1) | (id >= options.experts);
  if (!wrong) return;
  for (std::int64_t i = 0;; ++i) {
    const std::int32_t id = all[at(i)];
    if (id >= -1 && id < options.experts) continue;
    const std::string where =
        "ids[" + std::to_string(i / ids.size(1)) + "," + std::to_string(i % ids.size(1)) + "] = " + std::to_string(id);
    refuse(where + (id < -1 ? " is below -1" : " is not below num_experts " + std::to_string(options.experts)));
  }
}

/// Fills what this rank knows alone: its rows per expert, the place of each slot among its expert's, and the tokens
/// that each other rank needs.
void count(ConstTensor ids, const PlanOptions& options, Plan::Data& plan, std::int32_t* expert_counts,
           std::int32_t* unique_counts) {
  plan.tokens = ids.size(0);
  plan.topk = ids.size(1);
  plan.experts = options.experts;
  plan.alignment = options.alignment;
  plan.ids.assign(ids.as<std::int32_t>(), ids.as<std::int32_t>() + ids.elements());

  // Slot -1 is an expert too, the one before the first, on a rank before the first: no branch to mispredict.
  std::vector<SlotRow> next(at(plan.experts) + 1);
  for (std::int64_t e = 0; e < plan.experts; ++e) next[at(e + 1)].rank = owner_of(e, plan.ranks, plan.experts);
  std::vector<std::int32_t> last(at(plan.ranks) + 1, -1);  // the token last seen to need a rank
  // What is sent, in token order; one more is written than there is.
  std::pmr::vector<std::int32_t> destination(plan.ids.size() + 1, plan.memory.get());
  std::pmr::vector<std::int32_t> token_of(plan.ids.size() + 1, plan.memory.get());
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
  for (std::int64_t e = 0; e < plan.experts; ++e) expert_counts[e] = next[at(e + 1)].row;
  std::fill_n(unique_counts, plan.ranks, 0);
  for (i = 0; i < sends; ++i) ++unique_counts[destination[i]];
  plan.send_begin.assign(at(plan.ranks) + 1, 0);
  for (int d = 0; d < plan.ranks; ++d) plan.send_begin[at(d + 1)] = plan.send_begin[at(d)] + unique_counts[d];
  std::vector<std::int64_t> end(plan.send_begin.begin(), plan.send_begin.end() - 1);
  plan.send_tokens.resize(sends);
  for (i = 0; i < sends; ++i) plan.send_tokens[at(end[at(destination[i])]++)] = token_of[i];
}

/// Reads what rank `source` says of its rows; a rank can send no more rows to a rank than it has slots there.
void take_counts(const Communicator& communicator, int source, std::span<const std::byte> bytes, Plan::Data& plan,
                 std::vector<std::int32_t>& unique) {
  auto* counts = plan.counts.data() + at(source) * at(plan.experts);
  auto* unique_counts = unique.data() + at(source) * at(plan.ranks);
  std::memcpy(counts, bytes.data(), at(plan.experts) * sizeof *counts);
  std::memcpy(unique_counts, bytes.data() + at(plan.experts) * sizeof *counts, at(plan.ranks) * sizeof *unique_counts);
  bool sane = true;
  for (int d = 0; d < plan.ranks; ++d) {
    const ExpertRange range = experts_of(d, plan.ranks, plan.experts);
    std::int64_t slots = 0;
    for (std::int64_t e = range.first; e < range.first + range.count; ++e) {
      sane = sane && counts[e] >= 0;
      slots += counts[e];
    }
    sane = sane && unique_counts[d] >= 0 && unique_counts[d] <= slots && (d != source || unique_counts[d] == 0);
  }
  if (!sane) {
    communicator.fail(Error(ErrorCode::internal, "rank " + std::to_string(source) + " sent counts that cannot be",
                            {.rank = communicator.rank(), .peer = source, .operation = "plan"}));
  }
}

/// The first outbox row of each expert of `owner`, and one past the last row.
template <class Write>
std::int64_t lay_out(const Plan::Data& plan, int owner, Write write) {
  const ExpertRange range = experts_of(owner, plan.ranks, plan.experts);
  std::int64_t row = 0;
  for (std::int64_t e = range.first; e < range.first + range.count; ++e) {
    write(e, row);
    row += (plan.totals[at(e)] + plan.alignment - 1) / plan.alignment * plan.alignment;
  }
  return row;
}

void derive_offsets(Plan::Data& plan, const std::vector<std::int32_t>& unique) {
  const std::int64_t experts = plan.experts;
  plan.totals.assign(at(experts), 0);
  std::vector<std::int64_t> before(at(experts), 0);  // rows of ranks below this one
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

  const ExpertRange local = experts_of(plan.rank, plan.ranks, experts);
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

ExpertRange experts_of(int rank, int ranks, std::int64_t experts) {
  const std::int64_t first = rank * experts / ranks;
  return {first, (rank + 1) * experts / ranks - first};
}

int owner_of(std::int64_t expert, int ranks, std::int64_t experts) {
  return static_cast<int>(((expert + 1) * ranks - 1) / experts);
}

struct PendingPlan::State final : InFlight {
  State(const Context& context, ConstTensor ids, const PlanOptions& options)
      : communicator(context.communicator()),
        plan(std::make_shared<Plan::Data>(context.memory())),
        operation(communicator,
                  Signature("plan")
                      .with("topk", ids.shape().rank() == 2 ? ids.size(1) : 0)
                      .with("experts", options.experts)
                      .with("alignment", options.alignment),
                  context.timeout()) {}

  void advance() override {
    if (!reading && operation.agreed()) read();
  }
  void read() {
    block.used_by(operation.sequence());
    const std::vector<Slice> whole(at(plan->ranks), Slice{0, block.size()});
    reading.emplace(communicator, operation, block, whole, whole);
  }

  Communicator communicator;
  std::shared_ptr<Plan::Data> plan;
  Block block;
  std::optional<Reading> reading;
  Operation operation;  // last: it leaves the communicator's list before anything it uses goes
};

PendingPlan::PendingPlan(std::unique_ptr<State> state) : state_(std::move(state)) {}
PendingPlan::PendingPlan(PendingPlan&&) noexcept = default;
PendingPlan::~PendingPlan() = default;

PendingPlan start_plan(const Context& context, ConstTensor ids, const PlanOptions& options) {
  const Phase phase(context.trace(), operation_span("start plan"));
  auto state = std::make_unique<PendingPlan::State>(context, ids, options);
  state->operation.ready([&] {
    validate(ids, options);
    Plan::Data& plan = *state->plan;
    plan.rank = context.rank();
    plan.ranks = context.size();
    plan.id = state->operation.sequence();
    state->block = context.communicator().arena().allocate(at(options.experts + plan.ranks) * sizeof(std::int32_t));
    auto* counts = reinterpret_cast<std::int32_t*>(state->block.data());
    count(ids, options, plan, counts, counts + options.experts);
    return show(state->block);
  });
  state->operation.keep_advancing(state.get());
  return PendingPlan(std::move(state));
}

Plan PendingPlan::finish() {
  const std::unique_ptr<State> state = std::move(state_);
  const Phase phase(state->communicator.trace(), operation_span("finish plan"));
  Operation& operation = state->operation;
  operation.meet();
  if (!state->reading) state->read();
  state->reading->finish(state->communicator, operation);
  Plan::Data& plan = *state->plan;
  const auto ranks = at(plan.ranks);
  plan.counts.resize(ranks * at(plan.experts));
  std::vector<std::int32_t> unique(ranks * ranks);
  for (int s = 0; s < plan.ranks; ++s) take_counts(state->communicator, s, state->reading->from(s), plan, unique);
  operation.complete();
  derive_offsets(plan, unique);
  place_slots(plan);
  return Plan(state->plan);
}

Plan make_plan(const Context& context, ConstTensor ids, const PlanOptions& options) {
  return start_plan(context, ids, options).finish();
}

std::int64_t Plan::tokens() const { return data_->tokens; }
std::int64_t Plan::topk() const { return data_->topk; }
std::int64_t Plan::experts() const { return data_->experts; }
ExpertRange Plan::local() const { return experts_of(data_->rank, data_->ranks, data_->experts); }
std::span<const std::int32_t> Plan::counts() const { return data_->counts; }
std::span<const std::int64_t> Plan::expert_totals() const { return data_->totals; }
std::span<const std::int64_t> Plan::offsets() const { return data_->offsets; }
std::span<const std::int64_t> Plan::rows() const { return data_->rows; }
std::span<const std::int64_t> Plan::sources() const { return data_->sources; }
std::span<const std::int32_t> Plan::sends(int rank) const {
  const auto begin = at(data_->send_begin[at(rank)]);
  return std::span(data_->send_tokens).subspan(begin, at(data_->send_begin[at(rank + 1)]) - begin);
}
std::int64_t Plan::send_row(int rank) const { return data_->send_row[at(rank)]; }
std::span<const std::int32_t> Plan::ids() const { return data_->ids; }
std::span<const SlotRow> Plan::slots() const { return data_->slots; }
std::int64_t Plan::slot_start(std::int64_t expert) const { return data_->slot_start[at(expert + 1)]; }
std::int64_t Plan::source_start(int source, std::int64_t e) const {
  return data_->source_start[at(source) * data_->rows.size() + at(e)];
}
std::int64_t Plan::bytes(std::int64_t width, DType dtype) const {
  return static_cast<std::int64_t>(data_->send_tokens.size() * size_of(dtype)) * width;
}
std::uint64_t Plan::id() const { return data_->id; }

}  // namespace expar
