// The MoE layer: router, plan, dispatch, experts and combine in one object, for inference and for training.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <expar/capacity.h>
#include <expar/experts.h>
#include <expar/optimizer.h>
#include <expar/router.h>
#include <expar/special.h>

namespace expar {

/// Memory of one pass of a layer, none of it needed afterwards.
struct ExpertsWorkspace;
std::shared_ptr<ExpertsWorkspace> make_experts_workspace();

struct MoeLayerOptions {
  std::int64_t hidden = 0;  // H
  std::int64_t inner = 0;   // F
  RouterOptions router;     // E, K, losses
  /// The last of the router's experts compute next to nothing, each rank for its own tokens: they have no rows in
  /// plans, no capacity, and their weights count on their results. `E` below are the others.
  SpecialExperts special = {};
  /// Of each expert, in training and inference alike. A layer has no second pass for an overflow. Re-routed slots weigh
  /// what the router would have given them.
  CapacityOptions capacity = {};
  Activation activation = Activation::swiglu;
  ActivationNumbers numbers = {};  // of the activation
  bool bias = false;
  WeightsOn weights_on = WeightsOn::output;
  /// Experts that every token visits, of this inner size together, without biases; 0: none. Every rank holds them and
  /// runs them on its own tokens between the start of the dispatch and its end.
  std::int64_t shared_inner = 0;
  /// Else they lie on ranks of their own: the first so many, fewer than P, hold one copy each and none of the other
  /// experts, and each token's row travels to one copy as to any expert. For inference alone. Results are the same
  /// bytes for any P and any number of copies; in bf16 what the shared experts give is rounded once more than beside
  /// the dispatch. In the plan the copies are the first experts, and each token has one slot more, the last.
  int shared_ranks = 0;
  bool shared_gate = false;  // their output is multiplied by sigmoid(x . shared.gate) (Qwen2-MoE)
  DType dtype = DType::f32;  // of x and of the experts' weights: f32 or bf16; the router computes in f32
  /// Inference uses bounded plans for so many tokens of each rank at the most, see make_bounded_plan; 0: exact ones.
  std::int64_t bound = 0;
  /// How tokens, and in the backward pass their gradients, travel to the experts, see DispatchOptions::payload; absent:
  /// as they are. The gradient of the rounding is taken as one.
  std::optional<DType> payload = {};
  std::optional<DType> gradient_payload = {};
  /// A record then keeps the rows that arrived and nothing that the experts made of them; backward makes it again, to
  /// the same bytes, at the cost of one more forward pass of the experts. Nothing travels twice.
  bool recompute = false;
  /// For inference alone: the weights of the experts exist once, in the layout that the kernels read, and are written
  /// by write_expert(), write_shared() or initialise(); there are no gradients. Results are the bytes of a training
  /// layer.
  bool inference = false;
  /// The parameters lie in memory of the caller, a framework's say, see MoeLayer::lend(): the only copy, so that none
  /// is ever stale. Results are the bytes of a layer that holds its own. Not with inference.
  bool lent = false;
  /// Tensor parallelism: ranks that hold the same experts in slices of F, gate and up by rows, down by columns. They
  /// hand in the same tokens, masks and gradients, each to its own context of E / P experts, and get the same bytes of
  /// everything; what the slices give is summed over them in rank order. An empty handle: nothing is in slices. With a
  /// context of one rank no token travels. Results differ from those of whole experts by the rounding of that sum.
  Communicator tensor = {};
  /// What a pass works in; layers may share one. Absent: the layer's own. A pass that starts while another has it gets
  /// more.
  std::shared_ptr<ExpertsWorkspace> workspace = {};

  std::int64_t routed_experts() const { return router.experts - special.count(); }  // E
  ExpertShape expert_shape() const { return {hidden, inner, activation, numbers, bias, weights_on, dtype}; }
  ExpertShape shared_shape() const {
    return {hidden, shared_inner, activation, numbers, false, WeightsOn::output, dtype};
  }
};

/// Milliseconds that this rank spent, added up over calls.
struct PhaseTimes {
  double route = 0, dispatch = 0, experts = 0, combine = 0, backward = 0;

  PhaseTimes& operator+=(const PhaseTimes& other) {
    route += other.route;
    dispatch += other.dispatch;
    experts += other.experts;
    combine += other.combine;
    backward += other.backward;
    return *this;
  }
};

/// What a forward pass may be given beside x; all of it may be left out.
struct MoeInputs {
  /// [T] int8: 0 is padding. It goes to no expert, its row of out is the residual or zero and that of dx is zero; the
  /// rest is as if it were not there.
  ConstTensor mask = {};
  ConstTensor tokens = {};  // [T] int32: token ids, for a router with a token table
  /// In training: this rank's sequences, and with gradient accumulation what MoeRecord::losses says of the
  /// micro-batches so far, for the balancing losses.
  LossInputs losses = {};
  ConstTensor ids = {};  // [T, K] int32: the Routing::ids of a pass that is to be repeated, by all ranks or none
  RmsNorm norm = {};     // of out, made while out is (see CombineOptions::norm); absent where its y is
  /// What the jitter of this call is drawn by: a name that no other call has ("layers.3, step 17").
  std::uint64_t seed = 0;
  std::string stream = {};
};

/// Where the parameters of one expert are read from: f32 or bf16, rounded to what the layer holds.
struct ExpertSource {
  ConstTensor up, down;                      // [2F, H] or [F, H]; [H, F]
  ConstTensor up_bias = {}, down_bias = {};  // [2F] or [F]; [H]; absent where the layer has no biases
};

/// What a forward pass decided, and what it leaves for backward, which may go over it again and gives the same bytes.
/// Reuse one per layer and call in flight.
struct MoeRecord {
  Routing routing;
  Capacity capacity;  // what its bound left of the routing; counts are empty where the layer has none
  /// Whoever multiplies its dscores and dlogsumexp by c before backward gets the gradient of c times the losses.
  RouterLosses losses;
  Plan plan;
  struct Kept;
  std::shared_ptr<Kept> kept;  // the rest, which the layer alone reads
};

/// A forward pass under way: what MoeLayer::start_forward returns. Must end before its layer does.
class PendingForward {
 public:
  /// Waits for the rows, runs the experts, and starts to bring the results back; finish() does it if nobody has.
  /// Throws Error: as forward, what start_forward has not thrown.
  void run_experts();
  /// Completes out, once. Throws Error: likewise.
  void finish();
  ~PendingForward();
  PendingForward(PendingForward&&) noexcept;

 private:
  friend class MoeLayer;
  struct State;
  explicit PendingForward(std::shared_ptr<State> state);
  std::shared_ptr<State> state_;
};

/// Its parameters are f32, with bf16 copies of the experts' weights where dtype is bf16; a layer for inference alone
/// has packed weights in place of both. They are its own, or its caller's where they are lent.
class MoeLayer {
 public:
  /// Collective. Throws Error: bad_argument (naming the option and its value), no_memory, mismatch, timeout, peer_lost:
  /// the same on every rank; after the first three the communicator stays usable.
  MoeLayer(const Context& context, const MoeLayerOptions& options);
  ~MoeLayer();
  MoeLayer(MoeLayer&&) noexcept;

  const MoeLayerOptions& options() const;
  ExpertRange local_experts() const;
  ExpertRange local_inner() const;  // of each expert's inner dimension; all of it where nothing is in slices
  bool holds_shared() const;        // the shared experts, on this rank

  /// Draws every parameter by its global name "<prefix>.experts.5.up", so that values do not depend on P:
  /// weights normal with deviation 1 / sqrt(inputs), biases 0, K different experts in each row of a token table. Also
  /// refreshes the low-precision copies. Not collective. Throws Error: no_memory, bad_argument (nothing was
  /// lent yet). Cost: one pass over the parameters.
  void initialise(std::uint64_t seed, std::string_view prefix);

  /// Write one of this rank's experts, by its global number, or the shared ones: from a file, say, with room for one
  /// expert at a time. refresh() afterwards. Not collective. Throws Error: bad_argument (not an expert of this rank, or
  /// no shared ones in this layer; shapes or dtypes), no_memory.
  /// Of the shared ones a rank that does not hold them takes the gate alone.
  void write_expert(std::int64_t expert, const ExpertSource& from);
  void write_shared(ConstTensor up, ConstTensor down, ConstTensor gate = {});
  /// Where MoeLayerOptions::lent: from here on the layer reads and writes these, which must stay until they are lent
  /// anew or the layer ends; what a pass under way reads must not move. Before each pass if they may have moved.
  ///   parameters : those of expert_parameters("") and dense_parameters(""), in any order, each with its `value` or, of
  ///     experts.up, experts.down, shared.up and shared.down in a layer of bf16, its `low` (what passes read; `value`
  ///     is then for initialise() and refresh() alone); backward writes the `gradient` of an expert's, and where that
  ///     is absent keeps it in memory of the layer's own
  /// Passes read what is there when they start and pack nothing, so that a change is seen whoever made it; selection
  /// bias and token table remain the layer's own. initialise(), write_expert(), write_shared() and refresh() write what
  /// was lent, copies rounded from the same numbers as ever. Before the first lend(), expert_parameters() and
  /// dense_parameters() say names, shapes and dtypes, without memory; after it, what was lent.
  /// Not collective. Throws Error: bad_argument (naming the parameter that is missing, unknown, of another shape or
  /// dtype, or without memory, and then nothing is taken; a layer with parameters of its own). Cost: no allocation.
  void lend(std::span<const Parameter> parameters);
  /// Bytes of all that this rank holds of the parameters, what was lent left out: values, copies, packed weights,
  /// gradients.
  std::size_t parameter_bytes() const;

  /// Refreshes the low-precision copies after the masters were written by hand. From here on inference packs the
  /// weights once, for speed; it reads the plain ones again, with the same bits, from the next expert_parameters() or
  /// backward() on, because an optimizer's step may follow. Whoever steps or writes without these calls refreshes
  /// again. Nothing to do in a layer for inference alone, whose weights are packed as they are written. Not collective.
  /// Cost: one pass over the experts' weights where dtype is bf16.
  void refresh();

  /// experts.up, experts.down and, where there are biases, experts.up_bias and experts.down_bias of this rank's
  /// experts; gradients are complete after backward. Not collective. Throws Error: bad_argument (a layer for inference
  /// alone has none), no_memory (room for the gradients, at the first call).
  std::vector<Parameter> expert_parameters(std::string_view prefix);
  /// What all ranks hold alike, of these what there is, in this order: router.weight [E, H], router.bias [E]; shared.up
  /// [2F, H] or [F, H], shared.down [H, F], shared.gate [H]; special.mix [C, 2, H], special.value [C, H] of the C
  /// constant experts. Their gradients are to be summed over shards and ranks by the caller. Where the layer is for
  /// inference alone, shared.up and shared.down are packed and not among them, and there are no gradients. Not
  /// collective. Throws Error: no_memory.
  std::vector<Parameter> dense_parameters(std::string_view prefix);
  /// [S, ...] f32, the gradient of each of dense_parameters() for each of this rank's shards, after backward and until
  /// the next one.
  std::vector<ConstTensor> dense_shard_gradients() const;
  /// What the router reads and no gradient changes, the same on all ranks: [E] f32, see update_selection_bias; [V, K]
  /// int32. Absent where the router has none.
  Tensor selection_bias();
  Tensor token_table();

  /// out = moe(x) + shared(x) + residual, for inference: nothing is kept.
  ///   x, out : [T, H] of dtype
  ///   residual : [T, H] or absent
  /// Collective. Throws Error, the same on every rank: bad_argument (shapes or dtypes; a context of other ranks or, in
  /// a layer for inference alone, other kernels; parameters that were not lent yet; NaN logits; more tokens than the
  /// bound; rows beyond the capacity, where that is an error), no_memory, mismatch, timeout, peer_lost, internal. What
  /// a rank finds wrong up to its plan leaves the communicator usable; what goes wrong between operations after that
  /// ends the job.
  ///
  /// Cost: with bounded plans, between mapped ranks and without a capacity, no allocation after the first calls, but
  /// where more rows come than ever before.
  void forward(const Context& context, ConstTensor x, Tensor out, ConstTensor residual = {},
               const MoeInputs& inputs = {});
  /// Routing, capacity and plan of the last such pass, until the next one; nothing else of it is kept.
  const MoeRecord& inference_record() const;

  /// The same for training. Throws Error: as above, and bad_argument where the layer is for inference alone, out is x,
  /// or the shards do not ascend from 0 to T.
  ///   shards : this rank's micro-shards of the global batch, [S + 1] from 0 to T (see router_losses)
  ///   record : keeps what backward needs; x must stay unchanged until then, so out must not be x
  void forward(const Context& context, ConstTensor x, Tensor out, ConstTensor residual,
               std::span<const std::int64_t> shards, MoeRecord& record, const MoeInputs& inputs = {});

  /// The same in phases, so that several micro-batches are in flight: chooses the experts, starts the dispatch and runs
  /// the shared experts. While other ranks are late this rank works on another batch:
  ///
  ///   a = start_forward(.. batch 1 ..); b = start_forward(.. batch 2 ..);
  ///   a.run_experts(); b.run_experts();
  ///   a.finish(); b.finish();
  ///
  /// Results are the bytes of one call after the other. It pays where ranks wait for each other, see docs/numbers.md;
  /// experts that get half the rows read their weights twice as often.
  ///   shards : as above, or absent: for inference; there is then no backward pass
  ///   record : of this batch alone until finish(), and until backward() if there is one
  /// A pass that is destroyed unfinished, as by an exception, leaves the others waiting for this rank.
  /// Collective; run_experts() and, of slices (`tensor`), finish() too: those of all passes in the same order on all
  /// ranks. Throws as forward; what a bounded plan finds wrong, run_experts() throws.
  PendingForward start_forward(const Context& context, ConstTensor x, Tensor out, ConstTensor residual,
                               std::optional<std::span<const std::int64_t>> shards, MoeRecord& record,
                               const MoeInputs& inputs = {});

  /// dx = gradient of x (through router and experts, without the residual), given dout; adds nothing, overwrites all
  /// gradients. The losses of the router count with their coefficients; dout belongs to a loss that is a mean over the
  /// global batch.
  ///   dout, dx : [T, H] of dtype; in bf16 the router's part of dx is rounded before it is added to the experts'
  /// Collective. Throws Error, the same on every rank: bad_argument (shapes or dtypes; a record without a forward pass;
  /// a layer for inference alone), no_memory, mismatch, timeout, peer_lost, internal. What a rank finds wrong before
  /// its dispatch leaves the communicator usable; what goes wrong later ends the job.
  void backward(const Context& context, MoeRecord& record, ConstTensor dout, Tensor dx);

  /// Since the last call; resets them.
  PhaseTimes take_times();

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace expar
