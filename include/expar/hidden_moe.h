// The MoE layer of ranks that all have the same tokens: each holds some experts and gets its slice of the output.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include <expar/experts.h>
#include <expar/partition.h>
#include <expar/router.h>

namespace expar {

/// What goes through an expert. H_r is the width of slice r, see partition.h.
enum class HiddenPartition : std::uint8_t {
  gathered,  // whole rows, W = H: the slices of all ranks are together what one rank computes alone, as bytes
  sliced,    // each slice by itself, W = ceil(H / P), zeros behind a narrower one: P heads that share their routes
};

/// How an expert kernel is told which rows belong to which expert.
enum class GroupList : std::uint8_t {
  cumulative,  // where the rows of each local expert end
  counts,      // how many each has
};

struct HiddenMoeOptions {
  std::int64_t hidden = 0;  // H
  /// E, K and how logits become weights; no choice that looks at the batches of all ranks.
  RouterOptions router;
  /// Off: the K largest logits are the weights as they are, for callers who have normalised them.
  bool normalize_router_logits = true;
  HiddenPartition partition = HiddenPartition::gathered;
  bool slices = false;  // x is this rank's slice [T, H_r], not [T, H]
  GroupList group_list = GroupList::cumulative;
};

/// Logits, or ids and weights: the other two stay absent. The same on all ranks, but for x where it is slices.
struct HiddenMoeInputs {
  ConstTensor x;             // [T, H] or [T, H_r], f32 or bf16
  ConstTensor logits = {};   // [T, E] f32
  ConstTensor ids = {};      // [T, K] int32
  ConstTensor weights = {};  // [T, K] f32
  ConstTensor bias = {};     // [H_r] f32, added to each row of out; absent: nothing
};

/// What a caller's expert kernel gets: R rows, those of one local expert after those of another.
struct ExpertBatch {
  ConstTensor rows;                          // [R, W]
  std::span<const std::int64_t> group_list;  // [L]
  Tensor out;                                // [R, W], where it leaves its results: an outbox, read by all ranks
};
using ExpertKernel = std::function<void(const ExpertBatch&)>;

/// out[t] = sum over slots k of weights[t, k] * this rank's slice of expert ids[t, k] at what goes through it, + bias.
///
/// Beside tensor parallelism, make it on the groups along "ep" of a Mesh {{"ep", n}, {"tp", m}}, with what the group's
/// "tp" coordinate holds of the hidden size as its H. For inference.
/// Source: "Integration Guide: All2All EP MoE in dlinfer" (fused_moe_all2all); `router.renormalise` is off there.
class HiddenMoe {
 public:
  /// Collective: the options are the same on all ranks, but for the group list.
  /// Throws Error: bad_argument (naming the value), mismatch, timeout, peer_lost. Cost: two meetings.
  HiddenMoe(const Context& context, const HiddenMoeOptions& options);
  ~HiddenMoe();
  HiddenMoe(HiddenMoe&&) noexcept;

  /// W: the width of the rows that experts take.
  std::int64_t width() const;

  /// With the caller's kernel.
  ///   out : [T, H_r]  dtype of x
  /// Collective, on the ranks and in the order of the making.
  /// Throws Error: bad_argument, mismatch (ranks whose ids differ), timeout, peer_lost. What arises on one rank between
  /// two operations, an exception of the kernel above all, ends the job with its own code, naming the rank.
  /// Cost: rows as dispatch and combine have them, packed once for the kernel; gathered, no row travels to its expert
  /// but slices where x is slices.
  void forward(const Context& context, const HiddenMoeInputs& inputs, const ExpertKernel& kernel, Tensor out);
  /// With expar's experts, of hidden size W: weights [L, 2F, W] and [L, W, F]. Rows are not packed.
  void forward(const Context& context, const HiddenMoeInputs& inputs, const ExpertShape& shape,
               const ExpertWeights& weights, Tensor out);

  /// Of the last pass that was given logits; empty before.
  const Routing& routing() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace expar
