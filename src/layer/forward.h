// One forward pass of a layer.
#pragma once

#include <optional>
#include <span>

#include <expar/layer.h>

#include "src/layer/state.h"

namespace expar {

struct PendingForward::State {
  /// Routes, plans and starts the dispatch; then does what each rank does for its own tokens.
  ///   shards : absent: for inference
  /// Collective.
  State(MoeLayer::State& layer, const Context& context, ConstTensor x, Tensor out, ConstTensor residual,
        std::optional<std::span<const std::int64_t>> shards, const MoeInputs& inputs, MoeRecord& record);
  void run_experts();
  void finish();

 private:
  using Shards = std::optional<std::span<const std::int64_t>>;

  void check(ConstTensor x, ConstTensor residual, const Shards& shards, const MoeInputs& inputs) const;
  void choose(ConstTensor x, const MoeInputs& inputs);
  void make_plan_of_choice();
  void count_losses(std::span<const std::int64_t> shards, const MoeInputs& inputs);
  void weigh_rerouted(const MoeInputs& inputs);
  void add_shared_slot(ConstTensor x);
  void compute_own_part(ConstTensor x);
  RouteInputs route_inputs(const MoeInputs& inputs) const;
  ExpertsRecord& made() { return keeps_ ? kept_.experts : workspace_->record; }
  SharedRecord& shared_made() { return keeps_ ? kept_.shared : workspace_->shared; }

  MoeLayer::State& layer_;
  Context context_;  // declines where this rank cannot go on
  MoeRecord& record_;
  MoeRecord::Kept& kept_;
  Tensor out_;
  bool trains_, keeps_;  // keeps: what the experts make is left for backward
  Workspaces::Loan workspace_;
  ConstTensor logits_;  // until the next pass starts
  ExpertWeights weights_;
  SharedWeights shared_weights_;
  Plan plan_;
  ConstTensor weights_by_slot_;
  CombineOptions added_;  // to what the experts give
  std::optional<PendingDispatch> rows_;
  std::optional<PendingCombine> results_;
};

}  // namespace expar
