// expar train: trains a byte-level MoE text model, and on request its dense twin, and says how well each predicts the
// held-out text.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>

#include "cli/chart.h"
#include "cli/dashboard.h"
#include "cli/options.h"
#include "cli/phases.h"
#include "cli/verbs.h"
#include "models/checkpoint.h"

namespace expar::cli {
namespace {

struct TrainFlags {
  std::string text;
  std::string dtype = "bf16";
  std::string router = "softmax";
  std::string capacity_policy = "drop_by_position";
  std::string mesh;
  std::string log_dir;
  const CLI::Option* log_dir_given = nullptr;
  bool dense = false;
  TrainOptions options;
  const CLI::App* app = nullptr;  // knows which flags were given
};

void add_flags(CLI::App& app, TrainFlags& flags) {
  TrainOptions& train = flags.options;
  TextModelOptions& model = train.model;
  const auto count = [&](const char* name, std::int64_t& value, const char* help, std::int64_t most = INT32_MAX) {
    app.add_option(name, value, help)->check(whole_number(1, most))->capture_default_str();
  };
  app.add_option("--text", flags.text, "the file to learn from")->required();
  count("--experts", model.moe.router.experts, "experts of each layer");
  count("--topk", model.moe.router.topk, "experts that work on each token");
  count("--hidden", model.moe.hidden, "width of a token");
  count("--inner", model.moe.inner, "inner width of an expert");
  count("--layers", model.layers, "MoE layers");
  count("--context", model.context, "bytes before the one to predict", Text::kMaxContext);
  count("--batch", train.batch, "tokens of a step, over all ranks");
  count("--shards", train.shards, "parts of a batch: results depend on them and not on the ranks");
  count("--steps", train.steps, "the step to stop at");
  count("--decay-steps", train.decay_steps,
        "steps over which the learning rate rises and falls, wherever --steps stops");
  app.add_option("--lr", train.lr, "learning rate at its peak")->check(number_above(0))->capture_default_str();
  app.add_option("--seed", train.seed, "seed of everything random")->check(whole_number(0))->capture_default_str();
  app.add_flag("--dense", flags.dense, "train the dense twin too: as many parameters work on each token");
  app.add_option("--dtype", flags.dtype, "of activations and weights: f32 or bf16")
      ->check(one_of({"f32", "bf16"}))
      ->capture_default_str();
  app.add_option("--mesh", flags.mesh,
                 "how ranks share the experts, like dp=2,ep=2,tp=2: replicas, whole experts, slices of them (default: "
                 "ep alone)");
  const std::vector<std::string> routers(router_names().begin(), router_names().end());
  app.add_option("--router", flags.router,
                 "how experts are chosen: softmax, as in a family of models, by sinkhorn; or with expert_choice, which "
                 "looks at the tokens after a byte too, so that its losses are too low")
      ->check(one_of(routers))
      ->capture_default_str();
  app.add_option("--bias-update-rate", train.bias_update_rate,
                 "how fast deepseek_v3's selection bias follows the loads, which no loss then balances")
      ->check(number_above(0))
      ->capture_default_str();
  app.add_option("--capacity-factor", model.moe.capacity.factor,
                 "an expert takes this many times its even share of a batch's slots (default: all it is given)")
      ->check(number_above(0));
  app.add_option("--capacity-policy", flags.capacity_policy,
                 "what becomes of the rest: drop_by_position keeps the first, drop_by_score the best; or error")
      ->check(one_of({"drop_by_position", "drop_by_score", "error"}))
      ->capture_default_str();
  flags.log_dir_given = app.add_option("--log-dir", flags.log_dir,
                                       "write losses, loads and times for TensorBoard into this directory (the dense "
                                       "twin's into its folder dense)");
  app.add_option("--save", train.save, "directory for a checkpoint of the last step");
  app.add_option("--save-every", train.save_every, "write it after every so many steps too")
      ->check(whole_number(1, INT32_MAX));
  app.add_option("--resume", train.resume, "directory of the checkpoint to go on from; other flags default to its own");
  flags.app = &app;
}

void set_capacity(const TrainFlags& flags, CapacityOptions& capacity) {
  const bool factor = flags.app->get_option("--capacity-factor")->count() > 0;
  const bool policy = flags.app->get_option("--capacity-policy")->count() > 0;
  if (factor) capacity.factor = flags.options.model.moe.capacity.factor;
  if (policy && capacity.factor == 0) {
    throw Error(ErrorCode::bad_argument, "--capacity-policy needs --capacity-factor");
  }
  const bool first = factor && capacity.policy == CapacityPolicy::none;
  if (policy || first) capacity.policy = parse_capacity_policy(flags.capacity_policy);
}

/// The options of the checkpoint, with the flags that were given on top. What the model is, none can change.
TrainOptions resumed(const TrainFlags& flags) {
  const SavedTraining saved = read_checkpoint(flags.options.resume);
  const auto refuse = [](const std::string& message) { throw Error(ErrorCode::bad_argument, message); };
  if (flags.dense) refuse("--dense contradicts --resume: the dense twin is not saved");
  if (flags.options.steps <= saved.step) {
    refuse("--steps = '" + std::to_string(flags.options.steps) + "' is not above the checkpoint's step " +
           std::to_string(saved.step) + ": nothing is left to train");
  }
  const auto contradicts = [&](const std::string& flag, const std::string& given, const std::string& there) {
    refuse(flag + " = '" + given + "' contradicts the checkpoint, which has " + there);
  };
  const CLI::Option* dtype = flags.app->get_option("--dtype");
  const std::string saved_dtype(name(saved.options.model.moe.dtype));
  if (dtype->count() > 0 && flags.dtype != saved_dtype) contradicts("--dtype", flags.dtype, saved_dtype);

  if (flags.app->get_option("--router")->count() > 0 && flags.router != saved.options.router) {
    contradicts("--router", flags.router, saved.options.router);
  }

  TrainOptions options = saved.options;
  const auto given = [&](const char* name, auto& value, bool fixed) {
    std::string flag = "--" + std::string(name);
    std::replace(flag.begin(), flag.end(), '_', '-');
    const CLI::Option* option = flags.app->get_option_no_throw(flag);
    if (option == nullptr || option->count() == 0) return;
    const auto wanted = option->as<std::decay_t<decltype(value)>>();
    if (fixed && wanted != value) contradicts(flag, std::to_string(wanted), std::to_string(value));
    value = wanted;
  };
  visit_extents(options, [&](const char* name, auto& value) { given(name, value, true); });
  visit_settings(options, [&](const char* name, auto& value) { given(name, value, false); });
  set_capacity(flags, options.model.moe.capacity);
  options.steps = flags.options.steps;
  options.save = flags.options.save;
  options.save_every = flags.options.save_every;
  options.resume = flags.options.resume;
  return options;
}

// Before any rank starts, so that a mistake is told at once. A pipe can be read only once, so not here.
void check_text(const TrainFlags& flags) {
  std::error_code ignored;
  const auto type = std::filesystem::status(flags.text, ignored).type();
  if (type == std::filesystem::file_type::fifo || type == std::filesystem::file_type::character) return;
  Text(read_file(flags.text, Text::kHeldOut + 1), flags.options.model.context, flags.text);
}

std::string dense_log_dir(const TrainFlags& flags) {
  return flags.log_dir.empty() ? std::string() : (std::filesystem::path(flags.log_dir) / "dense").string();
}

// Before any rank starts, likewise.
void prepare_log_directories(const TrainFlags& flags) {
  if (flags.log_dir_given->count() == 0) return;
  if (flags.log_dir.empty()) throw Error(ErrorCode::bad_argument, "--log-dir = '' is not the name of a directory");
  io::prepare_log_directory(flags.log_dir);
  if (flags.dense) io::prepare_log_directory(dense_log_dir(flags));
}

/// A line that is written over again and again, for somebody who waits at a terminal.
class ProgressLine {
 public:
  ProgressLine(const char* model, std::int64_t steps, bool speaks)
      : model_(model), steps_(steps), shown_(speaks && isatty(STDERR_FILENO) != 0) {}
  ~ProgressLine() {
    if (shown_) std::fputs("\r\x1b[K", stderr);
  }
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

  void show(const Progress& progress) {
    if (!shown_ || (Clock::now() < next_ && progress.step < steps_)) return;
    next_ = Clock::now() + std::chrono::milliseconds(100);
    std::fprintf(stderr, "\r%s: step %lld of %lld, loss %.3f bits per byte, %.0f tokens/s\x1b[K", model_,
                 static_cast<long long>(progress.step), static_cast<long long>(steps_),
                 static_cast<double>(progress.loss) / std::log(2.0), progress.tokens_per_s);
  }

 private:
  const char* model_;
  std::int64_t steps_;
  bool shown_;
  Clock::time_point next_{};
};

std::vector<MeshDim> dims_of(const TrainFlags& flags) {
  return flags.mesh.empty() ? std::vector<MeshDim>{} : parse_mesh(flags.mesh);
}

/// log_dir : where rank 0 writes for TensorBoard; empty: nowhere
TrainReport train_one(const Context& context, const Parallel& ranks, const Text& text, const TrainOptions& options,
                      const char* name, const std::string& log_dir) {
  std::optional<Dashboard> dashboard;
  if (context.rank() == 0 && !log_dir.empty()) dashboard.emplace(log_dir, options);
  ProgressLine line(name, options.steps, context.rank() == 0);
  const TrainReport report = train(ranks, text, options, [&](const Progress& progress) {
    line.show(progress);
    if (dashboard) dashboard->show(progress);
  });
  if (dashboard) dashboard->show_heldout(report);
  return report;
}

/// [layers][E]
std::vector<std::span<const std::int64_t>> by_layer(const std::vector<std::int64_t>& loads,
                                                    const TrainOptions& options) {
  const auto experts = static_cast<std::size_t>(options.model.moe.router.experts);
  std::vector<std::span<const std::int64_t>> layers;
  for (std::size_t at = 0; at < loads.size(); at += experts) layers.push_back(std::span(loads).subspan(at, experts));
  return layers;
}

nlohmann::json to_json(const Communicator& communicator, const TrainOptions& options, const TrainReport& moe,
                       const std::optional<TrainReport>& dense) {
  nlohmann::json phases = {{"optimizer", moe.optimizer_ms}};
  for (const auto& [name, ms] : kPhases) phases[name] = moe.phase_ms.*ms;
  nlohmann::json result = {
      {"ranks", communicator.size()},
      {"transport", communicator.transport_name()},
      {"steps", options.steps},
      {"losses", moe.losses},
      {"heldout_bits_per_byte", moe.heldout_bits_per_byte},
      {"tokens_per_s", moe.tokens_per_s},
      {"phase_ms", phases},
      {"load_max_over_mean", moe.load_max_over_mean},
      {"dropped", moe.dropped},
      {"loads", {{"first", by_layer(moe.first_loads, options)}, {"last", by_layer(moe.last_loads, options)}}}};
  if (dense) result["dense_heldout_bits_per_byte"] = dense->heldout_bits_per_byte;
  return result;
}

void print_model(const char* name, const TrainReport& report) {
  std::printf("%-8s %22.4f %10.0f %14.2f %14lld\n", name, report.heldout_bits_per_byte, report.tokens_per_s,
              report.load_max_over_mean, static_cast<long long>(report.dropped));
}

void print_phases(const char* name, const TrainReport& report) {
  std::printf("%-8s", name);
  for (const NamedPhase& phase : kPhases) std::printf(" %9.2f", report.phase_ms.*phase.ms);
  std::printf(" %9.2f\n", report.optimizer_ms);
}

void print_loads(const TrainOptions& options, const TrainReport& report) {
  const auto first = by_layer(report.first_loads, options);
  const auto last = by_layer(report.last_loads, options);
  std::printf("\nslots per expert in the first tenth of the steps, and in the last; half a column is the mean\n");
  for (std::size_t layer = 0; layer < first.size(); ++layer) {
    std::printf("layer %-3zu %s  max/mean %-6.2f %s  max/mean %.2f\n", layer, chart_of_loads(first[layer]).c_str(),
                max_over_mean(first[layer]), chart_of_loads(last[layer]).c_str(), max_over_mean(last[layer]));
  }
}

void print(const TrainOptions& options, const TrainReport& moe, const std::optional<TrainReport>& dense) {
  const MoeLayerOptions& layer = options.model.moe;
  std::printf("%lld of %lld experts of inner size %lld in each of %lld layers, hidden size %lld, %s\n",
              static_cast<long long>(layer.router.topk), static_cast<long long>(layer.router.experts),
              static_cast<long long>(layer.inner), static_cast<long long>(options.model.layers),
              static_cast<long long>(layer.hidden), std::string(name(layer.dtype)).c_str());
  std::printf("%lld steps of %lld tokens; judged by %lld held-out bytes\n\n", static_cast<long long>(options.steps),
              static_cast<long long>(options.batch), static_cast<long long>(moe.heldout_bytes));
  std::printf("%-8s %22s %10s %14s %14s\n", "", "held-out bits per byte", "tokens/s", "load max/mean", "dropped slots");
  print_model("MoE", moe);
  if (dense) print_model("dense", *dense);
  std::printf("\n%-8s", "ms/step");
  for (const NamedPhase& phase : kPhases) std::printf(" %9s", phase.name);
  std::printf(" %9s\n", "optimizer");
  print_phases("MoE", moe);
  if (dense) print_phases("dense", *dense);
  print_loads(options, moe);
}

nlohmann::json run_train(const TrainFlags& flags, const Communicator& communicator, const Common& common) {
  const Context context(communicator, common.context_options());
  const TrainOptions& options = flags.options;
  const Text text(read_text(context, flags.text), options.model.context, flags.text);
  const Parallel ranks(context, dims_of(flags));
  const TrainReport moe = train_one(context, ranks, text, options, "MoE", flags.log_dir);
  std::optional<TrainReport> dense;
  if (flags.dense) {
    TrainOptions twin = options;
    twin.model = dense_twin(options.model);
    twin.save.clear();
    dense = train_one(context, ranks, text, twin, "dense", dense_log_dir(flags));
  }
  if (communicator.rank() != 0) return nullptr;
  print(options, moe, dense);
  return to_json(communicator, options, moe, dense);
}

}  // namespace

Verb train_verb() {
  auto flags = std::make_shared<TrainFlags>();
  Verb verb;
  verb.name = "train";
  verb.help = "Train an expert-parallel MoE on the bytes of a text.";
  verb.add_options = [flags](CLI::App& app) { add_flags(app, *flags); };
  verb.ranks = [flags] { return places_of_mesh(flags->mesh); };
  verb.check = [flags](const Common&) {
    check_dims(dims_of(*flags));
    TrainOptions& options = flags->options;
    options.model.moe.dtype = parse_dtype(flags->dtype);
    choose_router(options, flags->router);
    if (options.resume.empty()) {
      set_capacity(*flags, options.model.moe.capacity);
    } else {
      options = resumed(*flags);
    }
    validate(options);
    if (flags->app->get_option("--bias-update-rate")->count() > 0 && !options.model.moe.router.selection_bias) {
      throw Error(ErrorCode::bad_argument,
                  "--bias-update-rate is for a router with a selection bias, which " + options.router + " has not");
    }
    if (options.save.empty() && options.save_every > 0) {
      throw Error(ErrorCode::bad_argument, "--save-every needs --save DIRECTORY");
    }
    check_text(*flags);
    if (!options.save.empty()) check_checkpoint_directory(options.save, options.model);
    prepare_log_directories(*flags);
  };
  verb.run = [flags](const Communicator& communicator, const Common& common) {
    return run_train(*flags, communicator, common);
  };
  return verb;
}

}  // namespace expar::cli
