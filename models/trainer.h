// Trains a TextModel on a text and judges it by what was held out.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/text.h"
#include "models/text_model.h"

namespace expar {

struct TrainOptions {
  TextModelOptions model;
  std::string router = "softmax";  // what choose_router() made of the model's router
  std::int64_t batch = 1024;       // tokens of a step, over all ranks
  std::int64_t shards = 8;   // micro-shards of the batch: losses are the same for every number of ranks, not of shards
  std::int64_t steps = 900;  // the step to stop at
  std::int64_t decay_steps = 900;  // over which the learning rate rises and falls, wherever the training stops
  float bias_update_rate = 1e-3F;  // of a router with a selection bias, each step
  float lr = 8e-3F;                // at its peak: after a linear warm-up, before a cosine decay
  std::uint64_t seed = 1;

  /// Directories of checkpoints, see checkpoint.h; empty: none.
  std::string resume;           // where to go on from
  std::string save;             // written at the end
  std::int64_t save_every = 0;  // and after every so many steps; 0: not
};

/// Throws Error: bad_argument (naming the option and its value).
void validate(const TrainOptions& options);

/// "softmax" and router_presets(), as far as a text model trains them.
std::span<const std::string_view> router_names();
/// Makes the model's router the one of that name, for its E and K. A router with a selection bias, or whose choice is
/// balanced by itself, has no balancing loss. Throws Error: bad_argument (an unknown name).
void choose_router(TrainOptions& options, const std::string& name);

/// Calls visit(name, value) for each extent of the model.
template <class Options, class Visit>
void visit_extents(Options& options, Visit visit) {
  visit("context", options.model.context);
  visit("layers", options.model.layers);
  visit("hidden", options.model.moe.hidden);
  visit("inner", options.model.moe.inner);
  visit("experts", options.model.moe.router.experts);
  visit("topk", options.model.moe.router.topk);
}
/// Calls visit(name, value) for each number that says how the model is trained, except when to stop.
template <class Options, class Visit>
void visit_settings(Options& options, Visit visit) {
  visit("balance", options.model.moe.router.balance);
  visit("z", options.model.moe.router.z);
  visit("batch", options.batch);
  visit("shards", options.shards);
  visit("decay_steps", options.decay_steps);
  visit("bias_update_rate", options.bias_update_rate);
  visit("lr", options.lr);
  visit("seed", options.seed);
}

struct TrainReport {
  std::vector<float> losses;  // [steps of this run] mean cross-entropy of each step's batch before the step, nats
  double heldout_bits_per_byte = 0;
  std::int64_t heldout_bytes = 0;  // over how many: all, or kMaxHeldOut of them at even distances
  double tokens_per_s = 0;         // of training alone
  PhaseTimes phase_ms;             // per step, mean over ranks
  double optimizer_ms = 0;         // likewise
  /// [layers, E] slots over the first and the last tenth of the steps.
  std::vector<std::int64_t> first_loads, last_loads;
  double load_max_over_mean = 0;  // slots per expert over the last tenth of the steps; of the worst layer
  std::int64_t dropped = 0;       // slots, over all steps
};

inline constexpr std::int64_t kMaxHeldOut = 1 << 18;

/// After each step: what to show to somebody who waits. Spans are valid during the call.
struct Progress {
  std::int64_t step = 0;  // from 1
  float loss = 0;         // of this step's batch before the step, nats
  float lr = 0;
  double tokens_per_s = 0;              // of all steps so far
  std::span<const std::int64_t> loads;  // [layers, E] slots of this step's batch, over all ranks
  PhaseTimes phase_ms;                  // of this step on this rank
  double optimizer_ms = 0;              // likewise
  double step_ms = 0;                   // likewise, with all that belongs to no phase
};

/// Losses and bits per byte are the same bytes for every number of ranks and threads and every transport; times are
/// not (see TextModel for what a mesh changes). `watch` is called on every rank. Collective. Throws Error: bad_argument
/// (options; a loss that is not finite, naming the step), as TextModel.
TrainReport train(const Parallel& ranks, const Text& text, const TrainOptions& options,
                  FunctionRef<void(const Progress&)> watch);

/// The learning rate of step `step` (from 0) relative to its peak; after `decay_steps` it stays where it is.
float schedule(std::int64_t step, std::int64_t decay_steps);

/// Mean cross-entropy in bits over the held-out bytes, summed in an order that depends on neither ranks nor threads.
///   targets : how many bytes, at even distances; at most all of them
/// Collective.
double heldout_bits(const Context& context, TextModel& model, const Text& text, std::int64_t shards,
                    std::int64_t targets);

}  // namespace expar
