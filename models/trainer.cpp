// The training loop: draw, differentiate, step; then the held-out text.
#include "models/trainer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <numeric>
#include <string>

#include <expar/collectives.h>
#include <expar/optimizer.h>

#include "models/checkpoint.h"

namespace expar {
namespace {

constexpr std::int64_t kEvaluationTokens = 4096;  // of one batch; any number gives nearly the same sum
constexpr float kWarmUp = 0.05F;                  // part of the steps of the schedule
constexpr float kLastRate = 0.02F;                // of the peak

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// The doubles of all ranks, in rank order.
std::vector<double> gather_doubles(const Context& context, std::span<const double> mine, std::int64_t total) {
  std::vector<std::int64_t> bits(mine.size());
  std::transform(mine.begin(), mine.end(), bits.begin(),
                 [](double value) { return std::bit_cast<std::int64_t>(value); });
  Array all(DType::int64, {total});
  all_gather(context, ConstTensor(bits.data(), {static_cast<std::int64_t>(bits.size())}), all);
  std::vector<double> values(static_cast<std::size_t>(total));
  std::transform(all.as<std::int64_t>(), all.as<std::int64_t>() + total, values.begin(),
                 [](std::int64_t value) { return std::bit_cast<double>(value); });
  return values;
}

// Slots per (layer, expert), and how uneven they are.
class Loads {
 public:
  void add(std::span<const std::int64_t> loads) {
    sums_.resize(loads.size());
    std::transform(loads.begin(), loads.end(), sums_.begin(), sums_.begin(), std::plus<>());
  }
  const std::vector<std::int64_t>& sums() const { return sums_; }
  double max_over_mean(std::int64_t experts) const {
    double worst = 0;
    for (auto layer = sums_.begin(); layer != sums_.end(); layer += experts) {
      const auto sum = static_cast<double>(std::accumulate(layer, layer + experts, std::int64_t{0}));
      const auto max = static_cast<double>(*std::max_element(layer, layer + experts));
      worst = std::max(worst, max * static_cast<double>(experts) / sum);
    }
    return worst;
  }

 private:
  std::vector<std::int64_t> sums_;
};

// Once a first step has gone well, what goes wrong with the numbers is an explosion. Every rank finds the same, so all
// leave together.
float train_step(const Context& context, TextModel& model, const Batch& batch, const Sharding& sharding,
                 std::int64_t step) {
  const std::string advice = "; a lower learning rate may help";
  const std::string where = "step " + std::to_string(step) + ": ";
  float loss = 0;
  try {
    loss = model.train(context, batch, sharding);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::bad_argument || step == 1) throw;
    throw Error(error.code(), where + error.message() + advice, {error.rank(), error.peer(), error.operation()});
  }
  if (!std::isfinite(loss)) throw Error(ErrorCode::bad_argument, where + "the loss is not finite" + advice);
  return loss;
}

void report_times(const Context& context, PhaseTimes mine, double optimizer_ms, std::int64_t steps,
                  TrainReport& report) {
  const double row[] = {mine.route, mine.dispatch, mine.experts, mine.combine, mine.backward, optimizer_ms};
  constexpr std::size_t kTimes = std::size(row);
  const auto all = gather_doubles(context, row, static_cast<std::int64_t>(kTimes) * context.size());
  double means[kTimes] = {};
  for (std::size_t i = 0; i < all.size(); ++i) {
    means[i % kTimes] += all[i] / static_cast<double>(steps * context.size());
  }
  report.phase_ms = {means[0], means[1], means[2], means[3], means[4]};
  report.optimizer_ms = means[5];
}

}  // namespace

void validate(const TrainOptions& options) {
  const auto reject = [](std::string_view name, auto value, std::string_view rule) {
    throw Error(ErrorCode::bad_argument, std::string(name) + " " + std::to_string(value) + " " + std::string(rule));
  };
  validate(options.model);
  if (options.batch < 1) reject("batch", options.batch, "is not at least 1");
  if (options.shards < 1) reject("shards", options.shards, "is not at least 1");
  if (options.shards > options.batch) {
    reject("shards", options.shards, "exceeds the batch of " + std::to_string(options.batch) + " tokens");
  }
  if (options.steps < 1) reject("steps", options.steps, "is not at least 1");
  if (options.decay_steps < 1) reject("decay_steps", options.decay_steps, "is not at least 1");
  if (!std::isfinite(options.bias_update_rate) || options.bias_update_rate < 0) {
    reject("bias_update_rate", options.bias_update_rate, "is not a finite number from 0");
  }
  if (options.save_every < 0) reject("save_every", options.save_every, "is below 0");
  if (!std::isfinite(options.lr) || options.lr <= 0) reject("lr", options.lr, "is not a finite number above 0");
}

std::span<const std::string_view> router_names() {
  static constexpr std::string_view kNames[] = {"softmax", "mixtral",     "qwen2_moe",    "qwen3_moe",
                                                "olmoe",   "deepseek_v2", "deepseek_v3",  "gpt_oss",
                                                "llama4",  "sinkhorn",    "expert_choice"};
  return kNames;
}

void choose_router(TrainOptions& options, const std::string& name) {
  RouterOptions& router = options.model.moe.router;
  RouterOptions chosen{.experts = router.experts, .topk = router.topk};
  if (name != "softmax") chosen = router_preset(name, router.experts, router.topk);
  chosen.balance = chosen.selection_bias || is_collective(chosen.choice) ? 0.0F : router.balance;
  chosen.z = router.z;
  router = chosen;
  options.model.moe.weights_on = name == "llama4" ? WeightsOn::input : WeightsOn::output;
  options.router = name;
}

float schedule(std::int64_t step, std::int64_t decay_steps) {
  const auto warm = std::max(1.0F, kWarmUp * static_cast<float>(decay_steps));
  const auto now = static_cast<float>(std::min(step, decay_steps - 1)) + 1.0F;
  if (now < warm) return now / warm;
  const float part = (now - warm) / std::max(1.0F, static_cast<float>(decay_steps) - warm);
  return kLastRate + (1.0F - kLastRate) * 0.5F * (1.0F + std::cos(std::numbers::pi_v<float> * part));
}

TrainReport train(const Parallel& ranks, const Text& text, const TrainOptions& options,
                  FunctionRef<void(const Progress&)> watch) {
  validate(options);
  const Context& context = ranks.data;
  TextModel model(ranks, options.model, options.seed);
  AdamW optimizer;
  if (!options.resume.empty()) load_checkpoint(ranks, options.resume, model, optimizer);
  const std::int64_t first_step = optimizer.steps();
  const auto parameters = model.parameters();
  const Sampler sampler(text.training_targets(), options.seed);
  const Sharding sharding = shard_batch(options.batch, options.shards, context.rank(), context.size());
  const std::int64_t tenth = std::max<std::int64_t>(1, options.steps / 10);

  TrainReport report;
  Batch batch;
  Loads first_loads, last_loads;
  PhaseTimes phase_ms;
  double optimizer_ms = 0;
  batch.positions.resize(static_cast<std::size_t>(options.batch));
  const auto start = Clock::now();
  for (std::int64_t step = first_step; step < options.steps; ++step) {
    Progress progress;
    progress.step = step + 1;
    progress.lr = options.lr * schedule(step, options.decay_steps);
    {
      const Phase whole(context.trace(), "step", &progress.step_ms);
      for (std::int64_t t = 0; t < options.batch; ++t) {
        batch.positions[static_cast<std::size_t>(t)] = text.training_target(sampler.target(step * options.batch + t));
      }
      fill_batch(text, batch);
      progress.loss = train_step(context, model, batch, sharding, step + 1);
      const Phase phase(context.trace(), "optimizer", &progress.optimizer_ms);
      optimizer.step(context, parameters, progress.lr);
      model.follow_loads(options.bias_update_rate);
      model.gather(context);
    }
    progress.phase_ms = model.take_times();
    progress.loads = model.loads();

    phase_ms += progress.phase_ms;
    optimizer_ms += progress.optimizer_ms;
    report.losses.push_back(progress.loss);
    report.dropped += model.dropped();
    if (step < first_step + tenth) first_loads.add(model.loads());
    if (step >= options.steps - tenth) last_loads.add(model.loads());
    report.tokens_per_s =
        1e3 * static_cast<double>((step + 1 - first_step) * options.batch) / milliseconds_since(start);
    progress.tokens_per_s = report.tokens_per_s;
    watch(progress);

    const bool last = step + 1 == options.steps;
    const bool due = options.save_every > 0 && (step + 1) % options.save_every == 0;
    if (!options.save.empty() && (last || due)) save_checkpoint(ranks, options.save, model, optimizer, options);
  }

  report.first_loads = first_loads.sums();
  report.last_loads = last_loads.sums();
  report.load_max_over_mean = last_loads.max_over_mean(options.model.moe.router.experts);
  report_times(context, phase_ms, optimizer_ms, options.steps - first_step, report);
  report.heldout_bytes = std::min(kMaxHeldOut, text.heldout_targets());
  report.heldout_bits_per_byte = heldout_bits(context, model, text, options.shards, report.heldout_bytes);
  return report;
}

double heldout_bits(const Context& context, TextModel& model, const Text& text, std::int64_t shards,
                    std::int64_t targets) {
  const Phase phase(context.trace(), "held-out");
  std::vector<double> nats;  // of each of this rank's shards, over all batches
  Batch batch;
  for (std::int64_t first = 0; first < targets; first += kEvaluationTokens) {
    const std::int64_t tokens = std::min(kEvaluationTokens, targets - first);
    batch.positions.clear();
    for (std::int64_t i = first; i < first + tokens; ++i) {
      batch.positions.push_back(text.heldout_target(i * text.heldout_targets() / targets));
    }
    fill_batch(text, batch);
    const Sharding sharding = shard_batch(tokens, shards, context.rank(), context.size());
    nats.resize(static_cast<std::size_t>(sharding.local_shards()));
    model.evaluate(context, batch, sharding, nats);
  }
  const auto all = gather_doubles(context, nats, shards);
  return std::accumulate(all.begin(), all.end(), 0.0) / std::numbers::ln2 / static_cast<double>(targets);
}

}  // namespace expar
