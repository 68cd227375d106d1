// Carries tokens to the ranks that hold their experts, and brings the results back.
//
// Each is the other's gradient: the gradient of dispatch is an unweighted combine, that of combine is a dispatch.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include <expar/norm.h>
#include <expar/plan.h>

namespace expar {

/// How the rows stand that a local expert takes, and the results of it. All but `indexed` pack a copy of them after
/// arrival, for callers' own kernels; the rows of one source for one expert are together everywhere, by token and slot.
enum class Layout : std::uint8_t {
  indexed,       // rows once per source token, and per expert a list that says which rows it takes
  expert_major,  // [R, H], expert by expert, each beginning at a multiple of the plan's alignment, zeros between
  padded,        // [L, capacity, H], expert by expert, zeros behind the rows of each
  rank_major,    // [R, H], source by source, then expert by expert; without alignment
};
inline constexpr Layout kLayouts[] = {Layout::indexed, Layout::expert_major, Layout::padded, Layout::rank_major};
std::string_view name(Layout layout);

/// What arrived at this rank. Move-only; its memory goes back to the arena with it. Nothing here throws; an inbox that
/// was moved from may only be destroyed or assigned to.
/// The rank's own rows are read where they lie (but for a payload): x must neither move nor change while the inbox is
/// in use.
class Inbox {
 public:
  Inbox();
  ~Inbox();
  Inbox(Inbox&&) noexcept;
  Inbox& operator=(Inbox&&) noexcept;

  const Plan& plan() const;
  /// [U, H] rows of other ranks, source by source, tokens ascending.
  ConstTensor rows() const;
  /// [R] for each local expert, in order, the row (base 0: x, base 1: rows()), and the weight it came with.
  std::span<const RowRef> refs() const;
  std::span<const float> weights() const;
  /// All R rows, by refs(), as the kernels take them.
  Rows expert_rows() const;
  Layout layout() const;
  /// The rows in the shape of layout(); absent where it is indexed.
  ConstTensor packed() const;
  /// Where rows begin in packed(), counted in rows. rank_major: [P L + 1], those of source s for local expert e begin
  /// at [s L + e] and end where the next begin. Others: [L + 1], expert e has plan().rows()[e] of them from [e] on.
  std::span<const std::int64_t> offsets() const;

 private:
  friend class PendingDispatch;
  struct Data;
  explicit Inbox(std::shared_ptr<Data> data);
  std::shared_ptr<Data> data_;
};

struct NamedNumber {
  std::string_view name;  // of a constant
  std::int64_t value = 0;
  friend bool operator==(const NamedNumber&, const NamedNumber&) = default;
};

struct DispatchOptions {
  Layout layout = Layout::indexed;
  /// Rows per local expert in Layout::padded, the same on all ranks. An expert that has more, wherever, is an error.
  std::int64_t capacity = 0;
  /// How rows travel, the same on all ranks: one of kPayloads (kernels.h); absent: as they are. They are rounded as
  /// they are written, and arrive in x's dtype again; a rank's own rows are rounded alike, so that results do not
  /// depend on P.
  std::optional<DType> payload = {};
  /// The inbox of an earlier dispatch with the same plan: the same rows go the same way, so its lists serve again and
  /// only rows travel. For gradients and replays.
  const Inbox* lists_of = nullptr;
  /// Numbers of the caller's own, as his modes, that must be the same on all ranks. Read in start_dispatch.
  std::span<const NamedNumber> alike = {};
};

class PendingDispatch {
 public:
  /// Copies what is still to copy, waits for all rows, returns them. Operations may finish in any order. Throws Error:
  /// as dispatch.
  Inbox finish();
  ~PendingDispatch();
  PendingDispatch(PendingDispatch&&) noexcept;

 private:
  friend PendingDispatch start_dispatch(const Context& context, ConstTensor x, ConstTensor weights, const Plan& plan,
                                        const DispatchOptions& options);
  struct State;
  explicit PendingDispatch(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

/// Carries each token once to each other rank that holds one of its experts.
///   x       : [T, H]  this rank's tokens, f32 or bf16
///   weights : [T, K]  f32, travel beside the rows; absent (`{}`): every weight is 1
///   plan    : from make_plan; the same plan serves combine and the backward pass. Of a bounded one that is the inbox's
///             plan(), complete; x then waits in room for the bound until the other ranks have read it
///   returns : inbox [U, H] and a list of rows per local expert
/// Of a replicated plan x is the same bytes on all ranks; nothing is sent, and the lists take rows from x alone.
/// Collective: H, dtype, payload, layout and capacity are the same on all ranks.
/// Throws Error: bad_argument (x or weights disagree with the plan, lists_of is of another; a payload that is none; a
/// layout that the plan cannot have; more rows than the capacity; what a plan made alone was refused for), no_memory,
/// mismatch, timeout, peer_lost, internal.
/// Waits: exact, until all have started and again until their rows have come; bounded, once.
/// Cost: one read and one write of each row that leaves, bounded of each of the T rows and of each that comes; no
/// allocation after the first call. A payload is read and written once more on arrival, and so are own rows. Packing
/// reads and writes each of the R rows once more.
Inbox dispatch(const Context& context, ConstTensor x, ConstTensor weights, const Plan& plan,
               const DispatchOptions& options = {});
PendingDispatch start_dispatch(const Context& context, ConstTensor x, ConstTensor weights, const Plan& plan,
                               const DispatchOptions& options = {});

/// Where experts write their R results so that the sources can read them. Move-only.
class Outbox {
 public:
  Outbox() = default;
  Outbox(Block block, Tensor rows, Layout layout = Layout::indexed)
      : block_(std::move(block)), rows_(rows), layout_(layout) {}
  /// Row i is the result of the inbox's refs()[i] or, made for a packed inbox, of row i of its packed().
  Tensor rows() const { return rows_; }
  Layout layout() const { return layout_; }
  const Block& block() const { return block_; }
  Block& block() { return block_; }

 private:
  Block block_;
  Tensor rows_;
  Layout layout_ = Layout::indexed;
};

/// Room for R rows of `width` elements in this rank's arena. Not collective.
/// Throws Error: bad_argument (a width below 0; an open plan), no_memory.
Outbox make_outbox(const Context& context, const Plan& plan, std::int64_t width, DType dtype);
/// The same in the layout of `inbox`, in the shape of its packed() but for the width: a kernel that reads row i there
/// writes row i here, and combine finds it. What stands in rows of padding is never read.
Outbox make_outbox(const Context& context, const Inbox& inbox, std::int64_t width, DType dtype);

/// Says in a call of combine that slots are summed as they are.
inline constexpr std::nullopt_t unweighted = std::nullopt;

struct CombineOptions {
  /// [T, H] f32 added after the slots, each token's times shared_weights [T] f32 or, without them, as it is; absent:
  /// nothing. What every rank computes for its own tokens, as shared experts.
  ConstTensor shared = {};
  ConstTensor shared_weights = {};
  /// [T, H] added last, same dtype; absent: nothing.
  ConstTensor residual = {};
  /// Of the rows of out, in the pass that makes them; absent where its y is.
  RmsNorm norm = {};
  /// Of a replicated plan: out, shared and residual are columns part_of(H, rank, P) of what they were, without a norm,
  /// and of each result just these are read. The same on all ranks.
  bool slice = false;
  /// The ranks that hold slices of the same experts, and hand in the same tokens (tensor parallelism); an empty one, or
  /// one of a single rank: this rank has whole experts. What the slots give is a part then, rounded to dtype, and the
  /// parts of these ranks are summed in f32, in rank order, before anything is added. Not with `slice`.
  Communicator sum_over = {};
};

class PendingCombine {
 public:
  /// Waits until the other ranks' results are there and sums them into `out`. Throws Error: as combine.
  void finish();
  ~PendingCombine();
  PendingCombine(PendingCombine&&) noexcept;

 private:
  friend PendingCombine start_combine(const Context& context, const Plan& plan, Outbox& y,
                                      std::optional<ConstTensor> weights, Tensor out, const CombineOptions& options);
  struct State;
  explicit PendingCombine(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

/// Brings the results home: out[t] = sum over slots k of weights[t,k] * result(t,k), in slot order, then what is
/// shared, then the residual, in f32, rounded once. Slots with id -1 are left out.
///   y       : [R, H]  from make_outbox, filled, of the same layout on all ranks; it stays in place until combine or
///             finish() returns, and may be destroyed then
///   weights : [T, K] f32, or `unweighted`
///   out     : [T, H]  dtype of y; may be the residual itself
/// Of a replicated plan every rank gets all of out, or its columns of it (CombineOptions::slice).
/// Collective, with sum_over in finish() over its ranks too: those then finish in the same order, and throw each
/// other's errors.
/// Throws Error: bad_argument (a shape or dtype that disagrees with plan or y; a slice of another plan than a
/// replicated one, with a norm, or with sum_over; an open plan), no_memory, mismatch, timeout, peer_lost, internal.
/// Cost: one read of each of the T K rows where they lie, one write of T rows. Over S ranks of sum_over besides
/// 2 (S - 1) / S of T rows to each of them, every row being summed by one rank, and one more meeting.
void combine(const Context& context, const Plan& plan, Outbox& y, std::optional<ConstTensor> weights, Tensor out,
             const CombineOptions& options = {});
PendingCombine start_combine(const Context& context, const Plan& plan, Outbox& y, std::optional<ConstTensor> weights,
                             Tensor out, const CombineOptions& options = {});

/// Brings one row per slot home, unsummed: out [T, K, W] from values [R, W]; zeros where a slot is -1. dtype f32.
/// With W = 1: the gradient of the weights. Collective.
/// Throws Error: bad_argument (shapes or dtypes; an open plan), no_memory, mismatch, timeout, peer_lost, internal.
/// Cost: one read of each row where it lies, one write of each slot.
void fetch_slots(const Context& context, const Plan& plan, Outbox& values, Tensor out);

}  // namespace expar
