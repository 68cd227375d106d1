// Plan: counts rows, exchanges the counts, and derives every offset from them.
#include <expar/plan.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>

#include <expar/operation.h>

#include "src/dispatch/plan_data.h"
#include "src/util/check.h"
#include "src/util/kept.h"
#include "src/util/shown.h"

namespace expar {
namespace {

void validate_first_experts(std::span<const std::int64_t> first, int ranks, std::int64_t experts) {
  if (first.empty()) return;
  if (first.size() == at(ranks) + 1 && first.front() == 0 && first.back() == experts &&
      std::is_sorted(first.begin(), first.end())) {
    return;
  }
  refuse("first_experts are [" + shown(first) + "], should be " + std::to_string(ranks + 1) +
         " numbers that ascend from 0 to " + std::to_string(experts));
}

void validate(ConstTensor ids, const PlanOptions& options, int ranks) {
  if (options.experts < 1) refuse("num_experts is " + std::to_string(options.experts) + ", below 1");
  validate_first_experts(options.first_experts, ranks, options.experts);
  if (options.alignment < 1) refuse("alignment is " + std::to_string(options.alignment) + ", below 1");
  if (ids.dtype() != DType::int32 || ids.shape().rank() != 2) {
    refuse("ids is " + shown(ids) + ", should be int32 [T, K]");
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

/// For plans that are made without an exchange. An error is kept for the first operation, because here no rank meets
/// another.
Plan make_alone(const Context& context, FunctionRef<void(Plan::Data&)> make) {
  const Phase phase(context.trace(), operation_span("plan"));
  const auto plan = make_kept<Plan::Data>(context.memory(), context);
  try {
    make(*plan);
  } catch (...) {
    plan->failure = current_error();
  }
  return Plan(plan);
}

const Plan::Data& counted_only(const std::shared_ptr<const Plan::Data>& data) {
  if (data->failure) throw *data->failure;
  return *data;
}

const Plan::Data& complete_only(const std::shared_ptr<const Plan::Data>& data) {
  if (data->failure) throw *data->failure;
  if (data->id == 0) refuse("the plan is bounded and still open; the inbox of its dispatch has the complete one");
  return *data;
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
  State(const Context& context, const Signature& signature)
      : plan(make_kept<Plan::Data>(context.memory(), context)), operation(context.communicator(), signature) {}

  void advance() override {
    if (!reading && operation.agreed()) read();
  }
  void read() {
    const auto whole = [&](int) { return ByteRange{0, block.size()}; };
    reading.emplace(operation, block, whole, whole);
  }

  std::shared_ptr<Plan::Data> plan;
  Block block;
  std::optional<Reading> reading;
  Operation operation;  // last: it leaves the communicator's list before anything it uses goes
};

PendingPlan::PendingPlan(std::shared_ptr<State> state) : state_(std::move(state)) {}
PendingPlan::PendingPlan(PendingPlan&&) noexcept = default;
PendingPlan::~PendingPlan() = default;

PendingPlan start_plan(const Context& context, ConstTensor ids, const PlanOptions& options) {
  const Phase phase(context.trace(), operation_span("start plan"));
  Signature signature("plan");
  signature.with("topk", ids.shape().rank() == 2 ? ids.size(1) : 0).with("experts", options.experts);
  signature.with("alignment", options.alignment).with_list("first_experts", options.first_experts);
  auto state = make_kept<PendingPlan::State>(context.memory(), context, signature);
  state->operation.ready([&] {
    validate(ids, options, context.size());
    count(ids, options, *state->plan);
    return show_copy(state->operation, state->block, std::as_bytes(std::span(state->plan->own)));
  });
  state->operation.keep_advancing(state.get());
  return PendingPlan(std::move(state));
}

Plan PendingPlan::finish() {
  const std::shared_ptr<State> state = std::move(state_);
  Operation& operation = state->operation;
  const Phase phase(operation.communicator().trace(), operation_span("finish plan"));
  operation.meet();
  if (!state->reading) state->read();
  state->reading->finish();
  complete(operation, *state->reading, *state->plan);
  operation.complete();
  return Plan(state->plan);
}

Plan make_plan(const Context& context, ConstTensor ids, const PlanOptions& options) {
  return start_plan(context, ids, options).finish();
}

Plan make_bounded_plan(const Context& context, ConstTensor ids, std::int64_t bound, const PlanOptions& options) {
  return make_alone(context, [&](Plan::Data& plan) {
    validate(ids, options, plan.ranks);
    if (bound < 1) refuse("bound is " + std::to_string(bound) + ", below 1");
    if (bound > std::numeric_limits<std::int32_t>::max())
      refuse("bound is " + std::to_string(bound) + ", above 2^31 - 1");
    if (ids.size(0) > bound)
      refuse(std::to_string(ids.size(0)) + " tokens are more than the plan's bound of " + std::to_string(bound));
    plan.bound = bound;
    count(ids, options, plan);
  });
}

Plan make_replicated_plan(const Context& context, ConstTensor ids, const PlanOptions& options) {
  return make_alone(context, [&](Plan::Data& plan) {
    validate(ids, options, plan.ranks);
    plan.replicated = true;
    count(ids, options, plan);
    complete_replicated(plan);
  });
}

std::int64_t Plan::tokens() const { return data_->tokens; }
std::int64_t Plan::topk() const { return data_->topk; }
std::int64_t Plan::experts() const { return data_->experts; }
ExpertRange Plan::held_by(int rank) const { return counted_only(data_).held_by(rank); }
ExpertRange Plan::local() const { return held_by(data_->rank); }
std::span<const std::int32_t> Plan::counts() const { return complete_only(data_).counts; }
std::span<const std::int64_t> Plan::expert_totals() const { return complete_only(data_).totals; }
std::span<const std::int64_t> Plan::offsets() const { return complete_only(data_).offsets; }
std::span<const std::int64_t> Plan::rows() const { return complete_only(data_).rows; }
std::span<const std::int64_t> Plan::sources() const { return complete_only(data_).sources; }
std::span<const std::int32_t> Plan::sends(int rank) const {
  const Data& data = counted_only(data_);
  const auto begin = at(data.send_begin[at(rank)]);
  return std::span(data.send_tokens).subspan(begin, at(data.send_begin[at(rank + 1)]) - begin);
}
std::int64_t Plan::send_row(int rank) const { return complete_only(data_).send_row[at(rank)]; }
std::span<const std::int32_t> Plan::ids() const { return data_->ids; }
std::span<const SlotRow> Plan::slots() const { return complete_only(data_).slots; }
std::int64_t Plan::sent_bytes(std::int64_t width, DType dtype) const {
  return static_cast<std::int64_t>(data_->send_tokens.size() * size_of(dtype)) * width;
}
std::uint64_t Plan::id() const { return data_->id; }

}  // namespace expar
