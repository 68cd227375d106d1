// What one MoE layer would move and hold on ranks that need not exist: the model behind `expar plan`.
//
// Bytes are payload that ranks send to others in one forward pass, of all ranks together. They are exact for given
// routes; without them, the expectation of a router that chooses evenly, in closed form.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <expar/tensor.h>

#include "planner/grid.h"
#include "planner/traffic.h"

namespace expar::planner {

struct LayerSizes {
  std::int64_t hidden = 0;    // H
  std::int64_t inner = 0;     // F
  std::int64_t experts = 0;   // E
  std::int64_t topk = 0;      // K
  DType dtype = DType::bf16;  // f32 or bf16
  bool gated = true;
  bool bias = false;
  std::int64_t shared_inner = 0;  // 0: no shared experts
  bool shared_gate = false;
};

struct Question {
  LayerSizes sizes;
  std::int64_t tokens = 0;  // T, of each rank
  Grid grid;
  std::vector<std::int32_t> ids;  // [ranks T, K], rank after rank; empty: even choices
};

/// One way to compute the layer, and what it moves.
struct Way {
  const char* key;    // in JSON
  const char* label;  // for people
  Traffic traffic;
};

/// Of the rank that has most, in bytes; one layer.
struct Memory {
  std::int64_t weights = 0;         // in training: f32, and their copies of low precision
  std::int64_t gradients = 0;       // f32
  std::int64_t optimizer = 0;       // AdamW's moments
  std::int64_t activations = 0;     // what a forward pass leaves for backward outside the arena
  std::int64_t arena = 0;           // inbox and outbox, which peers address
  std::int64_t packed_weights = 0;  // of a layer for inference alone, in place of the first three

  std::int64_t training() const { return weights + gradients + optimizer + activations + arena; }
  std::int64_t inference() const { return packed_weights + activations + arena; }
};

/// Bytes of all ranks where each token takes so many experts.
struct CurvePoint {
  std::int64_t topk = 0;
  double ep = 0;
  double ep_per_slot = 0;
};

struct Answer {
  /// Over all ranks that are no data-parallel copies of each other (P of them):
  ///   ep                       a row once to each rank that needs it, and one back for each slot: what expar moves
  ///   ep_per_slot              a row for each slot, both ways
  ///   tp                       a ring all-reduce of the group's tokens, 2 (P - 1) T H elements per rank
  ///   allgather_reducescatter  all tokens to all ranks, and their sums back: the same bytes
  ///   hidden                   the hidden partition: the group's tokens are on all its ranks, and stay in slices
  ///   hidden_allgather         what bringing these slices together again moves besides
  /// and, where the grid has both directions:
  ///   etp                      tokens are gathered along tp, travel along ep, and are scattered along tp
  std::vector<Way> ways;
  Traffic dispatch, combine;  // of ep
  /// The least K at which ep_per_slot is not below tp, and the same for ep; absent: none up to E. Of given routes the
  /// first is extrapolated from all their slots, and the second looks no further than these.
  std::optional<std::int64_t> crossover, crossover_once;
  Memory memory;
};

/// Throws Error: bad_argument (sizes that cannot be, naming them; ids that do not fit). Cost: O(P^2 log E), or the same
/// number of passes over the ids.
Answer plan(const Question& question);

/// Bytes for each of `choices` choices per token; of given routes their first ones, so none may be above their K.
std::vector<CurvePoint> curve(const Question& question, const std::vector<std::int64_t>& choices);

}  // namespace expar::planner
