// Who sends which row where: made once from the router's choice, used by dispatch, combine and both their gradients.
//
// Errors of collectives, here and in dispatch.h: what a rank finds wrong before rows move (bad_argument, no_memory),
// every rank throws, that of the lowest such rank, and so with `mismatch`, where ranks disagree; the communicator stays
// usable. timeout, peer_lost, and internal (a rank sent what cannot be), end the job. What comes in two calls,
// start_... and finish(), throws all that in finish(), start_... only what has ended the job; unfinished it must not
// go, or the job ends.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include <expar/context.h>

namespace expar {

/// The experts of a rank where nothing else is said: floor(r E / P) ... floor((r + 1) E / P) - 1. May be none.
struct ExpertRange {
  std::int64_t first = 0;
  std::int64_t count = 0;
};
ExpertRange experts_of(int rank, int ranks, std::int64_t experts);
/// The rank that holds `expert` there.
int owner_of(std::int64_t expert, int ranks, std::int64_t experts);

struct PlanOptions {
  std::int64_t experts = 0;  // E
  /// [P + 1] where each rank's experts begin, ascending from 0 to E, the same on all ranks: rank r holds those from
  /// first_experts[r] up to first_experts[r + 1]. Empty: experts_of. Read until the plan is made.
  std::span<const std::int64_t> first_experts = {};
  /// Each expert's rows begin at a multiple of this (for callers' own kernels); the rows between are zero.
  std::int64_t alignment = 1;
};

/// Where the row of one (token, slot) lives: row `row` of the outbox of rank `rank`. rank -1: not routed.
struct SlotRow {
  std::int32_t rank = -1;
  std::int32_t row = 0;
};

/// A value: cheap to move and to copy, safe to keep. Every rank derives the same offsets from the same counts.
/// The rows of an expert stand in (source rank, token, slot) order: the global token order, whatever P is.
/// A bounded plan is open at first; the inbox of its dispatch has the complete one. Accessors throw Error bad_argument
/// where they need counts that an open plan lacks, and what a bounded or replicated plan was refused for.
class Plan {
 public:
  struct Data;
  Plan() = default;
  explicit Plan(std::shared_ptr<const Data> data) : data_(std::move(data)) {}
  explicit operator bool() const { return data_ != nullptr; }

  std::int64_t tokens() const;   // T
  std::int64_t topk() const;     // K
  std::int64_t experts() const;  // E
  bool open() const { return id() == 0; }
  ExpertRange held_by(int rank) const;
  ExpertRange local() const;  // those of this rank

  /// [P, E] rows that each rank has for each expert; of a replicated plan all have the same ones.
  std::span<const std::int32_t> counts() const;
  /// [E] rows of each expert over all ranks.
  std::span<const std::int64_t> expert_totals() const;
  /// [L + 1] first row of each local expert in the outbox; the last is R.
  std::span<const std::int64_t> offsets() const;
  /// [L] rows of each local expert; offsets()[e] + rows()[e] <= offsets()[e + 1].
  std::span<const std::int64_t> rows() const;
  std::int64_t received() const { return offsets().back(); }  // R
  /// [P + 1] first inbox row of each source; the last is U. This rank's own part is empty: its rows stay in x.
  std::span<const std::int64_t> sources() const;
  std::int64_t unique() const { return sources().back(); }  // U
  /// The tokens that go to `rank`, ascending, each once, and the inbox row of `rank` that the first of them takes.
  /// Replicated: those whose slices go there in join_slices, which have no inbox row.
  std::span<const std::int32_t> sends(int rank) const;
  std::int64_t send_row(int rank) const;
  /// [T, K]
  std::span<const std::int32_t> ids() const;
  std::span<const SlotRow> slots() const;

  /// Bytes of the rows that this rank writes to other ranks in a dispatch of rows of `width` elements that travel as
  /// `dtype`: of their values alone, without scales or tags. Replicated: in join_slices, of slices of `width` elements;
  /// a dispatch writes none.
  std::int64_t sent_bytes(std::int64_t width, DType dtype) const;
  /// The same on every rank: ties a plan to the operations that use it. 0 while it is open.
  std::uint64_t id() const;
  /// For the library's own use.
  const Data& data() const { return *data_; }

 private:
  std::shared_ptr<const Data> data_;
};

class PendingPlan {
 public:
  /// Waits for the counts of all ranks. Pending operations may finish in any order. Throws Error: as make_plan.
  Plan finish();
  ~PendingPlan();
  PendingPlan(PendingPlan&&) noexcept;

 private:
  friend PendingPlan start_plan(const Context& context, ConstTensor ids, const PlanOptions& options);
  struct State;
  explicit PendingPlan(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

/// Counts this rank's rows, exchanges the counts, and works out every offset.
///   ids : [T, K] int32 in [-1, E); -1 is not routed; the same expert twice in one token is two rows. T may differ per
///   rank.
/// Collective: K, E, first_experts and the alignment are the same on all ranks.
/// Throws Error: bad_argument (an option that cannot be; the shape or dtype of ids; "ids[17,2] = 64 is not below
/// num_experts 64"), no_memory, mismatch, timeout, peer_lost, internal.
/// Cost: one exchange of P x (E + P) integers.
Plan make_plan(const Context& context, ConstTensor ids, const PlanOptions& options);
PendingPlan start_plan(const Context& context, ConstTensor ids, const PlanOptions& options);

/// For decoding, where waiting costs more than bytes. The counts travel with the rows, in room for `bound` tokens of
/// each rank, and nobody waits before it sends; one such plan may serve several dispatches.
///   bound : the most tokens that any rank may have, the same on all ranks
/// Not collective, and throws nothing: what is wrong with the ids, or more tokens than the bound, is an error that
/// dispatch throws on every rank, and so is a plan that differs from the other ranks'. Cost: counting alone.
Plan make_bounded_plan(const Context& context, ConstTensor ids, std::int64_t bound, const PlanOptions& options);

/// For ranks that all have the same tokens, and so the same ids: each row is needed once, whoever reads its result. For
/// inference, see partition.h. An expert's rows stand in (token, slot) order, each once, whatever P is, and inboxes
/// hold no rows of other ranks. The id is a hash of what the plan was made from: ranks whose ids differ get `mismatch`
/// in the first operation that uses it. Not collective, and throws nothing: what is wrong with the ids is thrown in
/// that operation, on every rank. Cost: counting alone.
Plan make_replicated_plan(const Context& context, ConstTensor ids, const PlanOptions& options);

}  // namespace expar
