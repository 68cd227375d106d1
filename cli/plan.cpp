// expar plan: the flags of a question to the planner, and its answer as a table, as JSON and as a picture.
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>

#include <expar/mesh.h>

#include "bench/bench.h"
#include "bench/routes.h"
#include "cli/output.h"
#include "cli/plan_ascend.h"
#include "cli/verbs.h"
#include "io/model_config.h"
#include "io/routes.h"
#include "planner/picture.h"
#include "planner/planner.h"

namespace expar::cli {
namespace {

using planner::Traffic;

struct PlanFlags {
  std::string model, mesh, routes, dtype = "bf16", svg;
  bench::Options sizes;  // and where they go: what the benchmarks call them
  int ranks_per_node = 0;
  bool ascend = false;
  std::int64_t shared_experts = 1, shared_ranks = 0, hccl_buffsize = 0;  // the operators' own defaults; 0: not given
  std::vector<const CLI::Option*> numbers;                               // that a model has instead
  const CLI::Option* experts = nullptr;
  const CLI::Option* topk = nullptr;

  std::int64_t moe_layers = 0;  // of the model
  std::string family;
  std::int64_t groups = 1, groups_used = 1;
  planner::LayerSizes layer;
  std::vector<MeshDim> dims;
};

void add_flags(CLI::App& app, PlanFlags& flags) {
  bench::Options& o = flags.sizes;
  const auto size = whole_number(1, std::int64_t{1} << 24);
  app.add_option("--model", flags.model, "take the sizes from config.json of this Hugging Face checkpoint");
  flags.experts = app.add_option("--experts", o.experts, "experts (default 64)")->check(size);
  flags.topk = app.add_option("--topk", o.topk, "experts of each token (default 8)")->check(size);
  flags.numbers = {flags.experts, flags.topk,
                   app.add_option("--hidden", o.hidden, "hidden size (default 2048)")->check(size),
                   app.add_option("--inner", o.inner, "inner size of the experts (default 768)")->check(size)};
  app.add_option("--tokens", o.tokens, "tokens of each rank (default 1024)")->check(size);
  app.add_option("--dtype", flags.dtype, "of rows and weights: f32 or bf16 (default bf16)")
      ->check(one_of({"f32", "bf16"}));
  app.add_option("--routes", flags.routes,
                 "count these routes, as expar bench sends them: uniform, zipf:A, hot:N:F or a recorded FILE (default: "
                 "expect even choices)");
  app.add_option("--mesh", flags.mesh, "the ranks as dp, ep and tp, the last one fastest: ep=8,tp=2");
  app.add_option("--ranks-per-node", flags.ranks_per_node, "(default: one node)")->check(whole_number(1, 1024));
  CLI::Option* const ascend =
      app.add_flag("--ascend", flags.ascend, "also the rows, messages and buffer of Ascend's split-phase operators");
  app.add_option("--shared-experts", flags.shared_experts, "their shared_expert_num (default 1)")
      ->check(whole_number(0, 4))
      ->needs(ascend);
  app.add_option("--shared-ranks", flags.shared_ranks, "their shared_expert_rank_num (default 0)")
      ->check(whole_number(0, 1023))
      ->needs(ascend);
  app.add_option("--hccl-buffsize", flags.hccl_buffsize, "refuse if HCCL_BUFFSIZE, in MB, is too small for them")
      ->check(whole_number(1, std::int64_t{1} << 30))
      ->needs(ascend);
  app.add_option("--svg", flags.svg, "write bytes against top-k as a picture to this file");
}

void take_model(PlanFlags& flags) {
  for (const CLI::Option* option : flags.numbers) {
    if (option->count() > 0) {
      throw Error(ErrorCode::bad_argument, option->get_name() + " contradicts --model, which has its own");
    }
  }
  const io::ModelConfig config = io::read_model_config(flags.model);
  flags.family = config.family;
  flags.groups = config.groups;
  flags.groups_used = config.groups_used;
  for (std::int64_t layer = 0; layer < config.layers; ++layer) flags.moe_layers += config.is_moe(layer);
  flags.sizes.hidden = config.hidden;
  flags.sizes.inner = config.inner;
  flags.sizes.experts = config.experts;
  flags.sizes.topk = config.topk;
  flags.layer.bias = config.expert_bias;
  flags.layer.shared_inner = config.shared_inner;
  flags.layer.shared_gate = config.shared_gate;
}

void check_routes_of_model(const PlanFlags& flags) {
  const bench::RouteSource source = bench::parse_routes(flags.sizes.routes);
  if (source.kind != bench::RouteSource::Kind::file) return;
  const io::Routes file = io::read_routes(source.path, 0);
  if (file.experts == flags.sizes.experts && file.topk == flags.sizes.topk) return;
  const auto choice = [](std::int64_t topk, std::int64_t experts) {
    return std::to_string(topk) + " of " + std::to_string(experts);
  };
  throw Error(ErrorCode::bad_argument, flags.model + " has " + choice(flags.sizes.topk, flags.sizes.experts) +
                                           " experts for each token, but " + source.path + " " +
                                           choice(file.topk, file.experts));
}

void take_mesh(PlanFlags& flags, int ranks) {
  if (flags.mesh.empty()) {
    flags.dims = {{"ep", std::max(ranks, 1)}};
    return;
  }
  flags.dims = parse_mesh(flags.mesh);
  const planner::Grid grid(flags.dims, flags.ranks_per_node);
  if (ranks > 0 && ranks != grid.ranks()) {
    throw Error(ErrorCode::bad_argument, "--ranks = " + std::to_string(ranks) + ", but --mesh = '" + flags.mesh +
                                             "' has " + std::to_string(grid.ranks()));
  }
}

planner::AscendSizes ascend_sizes(const PlanFlags& flags, const planner::Grid& grid) {
  return {.domain = {.ep_world_size = grid.size("ep"),
                     .moe_expert_num = flags.layer.experts,
                     .shared_expert_num = flags.shared_experts,
                     .shared_expert_rank_num = flags.shared_ranks},
          .tokens = flags.sizes.tokens,
          .hidden = flags.layer.hidden,
          .topk = flags.layer.topk};
}

void check_ascend(const PlanFlags& flags) {
  const planner::Grid grid(flags.dims, flags.ranks_per_node);
  if (flags.shared_ranks >= grid.size("ep")) {
    throw Error(ErrorCode::bad_argument, "--shared-ranks = " + std::to_string(flags.shared_ranks) + " leaves none of " +
                                             std::to_string(grid.size("ep")) + " ranks for --experts");
  }
  if (flags.shared_ranks > 0 && (flags.shared_experts == 0 || flags.shared_ranks % flags.shared_experts != 0)) {
    throw Error(ErrorCode::bad_argument,
                "--shared-ranks = " + std::to_string(flags.shared_ranks) +
                    ", should be a multiple of --shared-experts = " + std::to_string(flags.shared_experts));
  }
  if (flags.hccl_buffsize == 0) return;
  const planner::AscendSizes sizes = ascend_sizes(flags, grid);
  ascend::check_hccl_buffer(sizes.domain, sizes.tokens, sizes.hidden, sizes.topk, flags.hccl_buffsize);
}

void check_flags(PlanFlags& flags, const Common& common) {
  const bool has_model = !flags.model.empty();
  if (has_model) take_model(flags);
  take_mesh(flags, common.ranks);
  bench::Options& o = flags.sizes;
  o.dtype = parse_dtype(flags.dtype);
  if (!flags.routes.empty()) o.routes = flags.routes;
  if (has_model) check_routes_of_model(flags);
  bench::check(o, has_model || flags.experts->count() > 0, has_model || flags.topk->count() > 0);
  flags.layer.hidden = o.hidden;
  flags.layer.inner = o.inner;
  flags.layer.experts = o.experts;
  flags.layer.topk = o.topk;
  flags.layer.dtype = o.dtype;
  if (flags.ascend) check_ascend(flags);
  if (flags.svg.empty()) return;
  const planner::Grid grid(flags.dims, flags.ranks_per_node);
  if (grid.ranks() == grid.size("dp")) {
    throw Error(ErrorCode::bad_argument, "--svg draws what travels between ranks, and each works alone here");
  }
  check_writable(flags.svg);
}

/// Whole numbers as such, so that programs compare them exactly.
nlohmann::json exact(double value) {
  const auto whole = static_cast<std::int64_t>(value);
  if (static_cast<double>(whole) == value) return whole;
  return value;
}

template <class T>
nlohmann::json or_null(const std::optional<T>& value) {
  return value ? nlohmann::json(*value) : nlohmann::json();
}

std::string routes_in_words(const PlanFlags& flags) {
  if (flags.routes.empty()) return "even choices";
  return "routes " + std::filesystem::path(flags.routes).filename().string();
}

nlohmann::json memory_as_json(const planner::Memory& memory) {
  return {{"weights", memory.weights},
          {"gradients", memory.gradients},
          {"optimizer", memory.optimizer},
          {"activations", memory.activations},
          {"arena", memory.arena},
          {"total", memory.training()},
          {"inference", {{"weights", memory.packed_weights}, {"total", memory.inference()}}}};
}

nlohmann::json plan_as_json(const PlanFlags& flags, const planner::Question& question, const planner::Answer& answer) {
  const planner::LayerSizes& sizes = question.sizes;
  const planner::Grid& grid = question.grid;
  const double ranks = grid.ranks();
  nlohmann::json object = {{"ranks", grid.ranks()},
                           {"nodes", grid.nodes()},
                           {"tokens", question.tokens},
                           {"hidden", sizes.hidden},
                           {"inner", sizes.inner},
                           {"experts", sizes.experts},
                           {"topk", sizes.topk},
                           {"dtype", name(sizes.dtype)},
                           {"routes", flags.routes.empty() ? "expected" : flags.routes}};
  for (const MeshDim& dim : flags.dims) object["mesh"][dim.name] = dim.size;
  if (!flags.model.empty()) object["model"] = {{"family", flags.family}, {"moe_layers", flags.moe_layers}};
  nlohmann::json& per_rank = object["bytes_per_rank"];
  nlohmann::json& all = object["bytes"];
  for (const planner::Way& way : answer.ways) {
    per_rank[way.key] = exact(way.traffic.bytes() / ranks);
    all[way.key] = exact(way.traffic.bytes());
    object["links"][way.key] = {{"within_node", exact(way.traffic.within_node / ranks)},
                                {"between_nodes", exact(way.traffic.between_nodes / ranks)}};
  }
  per_rank["between_nodes"] = object["links"]["ep"]["between_nodes"];
  all["dispatch"] = exact(answer.dispatch.bytes());
  all["combine"] = exact(answer.combine.bytes());
  object["crossover_topk"] = or_null(answer.crossover);
  object["crossover_topk_once"] = or_null(answer.crossover_once);
  object["memory"] = memory_as_json(answer.memory);
  if (flags.ascend) object.update(ascend_as_json(ascend_sizes(flags, grid)));
  return object;
}

std::string in_words(const PlanFlags& flags, const planner::Question& question) {
  const auto number_of = [](std::int64_t count, const std::string& thing) {
    return std::to_string(count) + " " + thing + (count == 1 ? "" : "s");
  };
  const planner::LayerSizes& sizes = question.sizes;
  return number_of(question.grid.ranks(), "rank") + " on " + number_of(question.grid.nodes(), "node") + ", " +
         number_of(question.tokens, "token") + " each; hidden " + std::to_string(sizes.hidden) + ", " +
         std::to_string(sizes.topk) + " of " + number_of(sizes.experts, "expert") + ", " +
         std::string(name(sizes.dtype)) + ", " + routes_in_words(flags);
}

void print_traffic(const planner::Question& question, const planner::Answer& answer) {
  const double ranks = question.grid.ranks();
  std::printf("%-34s %11s %14s %14s\n", "a rank sends, forward (mean)", "bytes", "within a node", "between nodes");
  for (const planner::Way& way : answer.ways) {
    std::printf("%-34s %11s %14s %14s\n", way.label, planner::shown_bytes(way.traffic.bytes() / ranks).c_str(),
                planner::shown_bytes(way.traffic.within_node / ranks).c_str(),
                planner::shown_bytes(way.traffic.between_nodes / ranks).c_str());
  }
}

void print_crossover(const char* way, const std::optional<std::int64_t>& topk, std::int64_t most) {
  if (topk) {
    std::printf("%s sends less than TP below top-k %lld\n", way, static_cast<long long>(*topk));
  } else {
    std::printf("%s sends less than TP up to top-k %lld at least\n", way, static_cast<long long>(most));
  }
}

void print_crossovers(const planner::Question& question, const planner::Answer& answer) {
  if (question.grid.size("ep") * question.grid.size("tp") == 1) return;
  const planner::LayerSizes& sizes = question.sizes;
  std::printf("\n");
  print_crossover("EP with a row for each slot", answer.crossover, sizes.experts);
  print_crossover("EP with a row once to each rank", answer.crossover_once,
                  question.ids.empty() ? sizes.experts : sizes.topk);
}

void print_memory(const PlanFlags& flags, const planner::Memory& memory) {
  struct Part {
    const char* name;
    std::int64_t training, inference;  // -1: none
    bool once;                         // inference uses the same for every layer
  };
  const Part parts[] = {{"weights", memory.weights, memory.packed_weights, false},
                        {"gradients", memory.gradients, 0, false},
                        {"optimizer", memory.optimizer, 0, false},
                        {"activations", memory.activations, memory.activations, true},
                        {"arena", memory.arena, memory.arena, true}};
  const std::int64_t layers = std::max<std::int64_t>(flags.moe_layers, 1);
  std::int64_t training = 0, inference = 0;
  const std::string title =
      "memory of the fullest rank, " + std::to_string(layers) + (layers == 1 ? " layer" : " layers");
  std::printf("%-34s %11s %14s\n", title.c_str(), "training", "inference");
  const auto line = [](const char* what, std::int64_t a, std::int64_t b) {
    std::printf("%-34s %11s %14s\n", what, planner::shown_bytes(static_cast<double>(a)).c_str(),
                planner::shown_bytes(static_cast<double>(b)).c_str());
  };
  for (const Part& part : parts) {
    line(part.name, part.training * layers, part.inference * (part.once ? 1 : layers));
    training += part.training * layers;
    inference += part.inference * (part.once ? 1 : layers);
  }
  line("all", training, inference);
}

nlohmann::json make_plan_of(const PlanFlags& flags) {
  const planner::Grid grid(flags.dims, flags.ranks_per_node);
  planner::Question question{.sizes = flags.layer, .tokens = flags.sizes.tokens, .grid = grid, .ids = {}};
  if (!flags.routes.empty()) question.ids = bench::make_routes(flags.sizes, grid.ranks() * question.tokens);
  const planner::Answer answer = planner::plan(question);
  const std::string sizes = in_words(flags, question);

  std::printf("%s\n", sizes.c_str());
  if (flags.routes.empty() && flags.groups_used < flags.groups) {
    std::printf(
        "(the model's router stays within %lld of %lld groups of experts, so rows go to fewer ranks than this)\n",
        static_cast<long long>(flags.groups_used), static_cast<long long>(flags.groups));
  }
  std::printf("\n");
  print_traffic(question, answer);
  print_crossovers(question, answer);
  std::printf("\n");
  print_memory(flags, answer.memory);
  if (flags.ascend) print_ascend(ascend_sizes(flags, grid));
  if (!flags.svg.empty()) write_file(flags.svg, planner::picture(question, answer, sizes));
  return plan_as_json(flags, question, answer);
}

}  // namespace

Verb plan_verb() {
  auto flags = std::make_shared<PlanFlags>();
  Verb verb;
  verb.name = "plan";
  verb.help = "Work out what a layer moves and holds on ranks that need not exist.";
  verb.add_options = [flags](CLI::App& app) { add_flags(app, *flags); };
  verb.check = [flags](const Common& common) { check_flags(*flags, common); };
  verb.run_alone = [flags](const Common&) { return make_plan_of(*flags); };
  return verb;
}

}  // namespace expar::cli
