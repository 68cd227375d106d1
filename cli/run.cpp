// expar run: one MoE block of a Hugging Face checkpoint over any number of ranks.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <optional>

#include <expar/collectives.h>
#include <expar/random.h>

#include "cli/output.h"
#include "cli/phases.h"
#include "cli/verbs.h"
#include "io/moe_block.h"

namespace expar::cli {
namespace {

constexpr const char* kHidden = "hidden_states";

struct RunFlags {
  std::string model, input, output, dtype;
  std::int64_t layer = 0, tokens = 128;
  std::uint64_t seed = 1;
  int shared_ranks = 0;
  std::vector<const CLI::Option*> random;  // flags of the input that is drawn where none is given
};

void add_flags(CLI::App& app, RunFlags& flags) {
  app.add_option("--model", flags.model, "directory of a Hugging Face checkpoint")->required();
  app.add_option("--layer", flags.layer, "which layer, counted from 0")->check(whole_number(0, INT32_MAX))->required();
  app.add_option("--input", flags.input, "safetensors file with hidden_states [T, H]; left out: random numbers");
  app.add_option("--output", flags.output,
                 "safetensors file to write: hidden_states [T, H], topk_ids and topk_weights [T, K]");
  app.add_option("--shared-ranks", flags.shared_ranks,
                 "the first so many ranks hold the shared experts, and nothing else (default 0: every rank does)")
      ->check(whole_number(0, INT32_MAX));
  flags.random = {
      app.add_option("--tokens", flags.tokens, "random input: T (default 128)")->check(whole_number(0, INT32_MAX)),
      app.add_option("--dtype", flags.dtype, "random input: f32, bf16 or f16 (default: of the weights)")
          ->check(one_of({"f32", "bf16", "f16"})),
      app.add_option("--seed", flags.seed, "random input: its seed (default 1)")->check(whole_number(0))};
}

/// The block and its input, as files: opened, checked, not read.
struct Files {
  explicit Files(const RunFlags& flags)
      : checkpoint(flags.model),
        config(io::read_model_config(flags.model)),
        block(checkpoint, config, flags.layer),
        dtype(flags.dtype.empty() ? block.dtype() : parse_dtype(flags.dtype)),
        tokens(flags.tokens) {
    if (flags.input.empty()) return;
    input.emplace(flags.input);
    hidden = &input->at(kHidden);
    dtype = hidden->dtype();
    const auto refuse = [&](ErrorCode code, const std::string& what) {
      throw Error(code, flags.input + ": hidden_states is " + hidden->str() + ", " + what);
    };
    if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16) {
      refuse(ErrorCode::unsupported, "neither F32 nor BF16 nor F16");
    }
    if (hidden->extents().size() != 2 || hidden->extents()[1] != config.hidden) {
      refuse(ErrorCode::bad_argument, "not [T, " + std::to_string(config.hidden) + "] as the model wants it");
    }
    tokens = hidden->extents()[0];
  }

  /// What the layer computes in: f32 holds every other dtype exactly.
  DType working() const { return dtype == DType::bf16 ? block.dtype() : DType::f32; }

  io::Checkpoint checkpoint;
  io::ModelConfig config;
  io::MoeBlock block;
  std::optional<io::SafetensorsFile> input;
  const io::StoredTensor* hidden = nullptr;  // null: random numbers
  DType dtype;                               // of the input and the output
  std::int64_t tokens;
};

void check_flags(const RunFlags& flags) {
  for (const CLI::Option* option : flags.random) {
    if (!flags.input.empty() && option->count() > 0) {
      throw Error(ErrorCode::bad_argument, option->get_name() + " is of the random input and contradicts --input");
    }
  }
  const Files files(flags);
  layer_options(files.config, files.working());
  if (!flags.output.empty()) check_writable(flags.output);
}

template <class T>
void round_to(const float* from, const Tensor& to) {
  std::transform(from, from + to.elements(), to.as<T>(), [](float value) { return T(value); });
}

/// f32 or the same dtype to f32, bf16 or f16.
void convert(const ConstTensor& from, const Tensor& to) {
  if (from.dtype() == to.dtype()) {
    std::copy_n(from.bytes(), from.byte_size(), to.bytes());
  } else if (to.dtype() == DType::bf16) {
    round_to<bf16>(from.as<float>(), to);
  } else {
    round_to<f16>(from.as<float>(), to);
  }
}

/// Normal numbers that can be written in the input's dtype, each by its global place.
void draw(const RunFlags& flags, DType dtype, std::int64_t first_row, const Tensor& x) {
  const Random random(flags.seed, kHidden);
  const auto first = static_cast<std::uint64_t>(first_row * x.size(1));
  for (std::int64_t i = 0; i < x.elements(); ++i) {
    float value = random.normal(first + static_cast<std::uint64_t>(i));
    if (dtype == DType::bf16) value = static_cast<float>(bf16(value));
    if (dtype == DType::f16) value = static_cast<float>(f16(value));
    if (x.dtype() == DType::bf16) {
      x.as<bf16>()[i] = bf16(value);
    } else {
      x.as<float>()[i] = value;
    }
  }
}

MoeLayer load(const Context& context, const RunFlags& flags, const Files& files) {
  MoeLayerOptions options = io::layer_options(files.config, files.working());
  options.inference = true;
  options.shared_ranks = flags.shared_ranks;
  MoeLayer layer(context, options);
  files.block.load(layer);
  return layer;
}

/// All ranks' rows on every rank.
Array gather(const Context& context, const ConstTensor& mine, std::int64_t rows) {
  Array all(mine.dtype(), {rows, mine.size(1)});
  all_gather(context, mine, all);
  return all;
}

/// Milliseconds of each phase, the mean over ranks.
nlohmann::json mean_times(const Context& context, const PhaseTimes& times) {
  constexpr auto kCount = std::int64_t{kForwardPhases.size()};
  Array mine(DType::f32, {1, kCount});
  float* own = mine.as<float>();
  for (const NamedPhase& phase : kForwardPhases) *own++ = static_cast<float>(times.*phase.ms);
  const Array all = gather(context, mine, context.size());
  nlohmann::json means;
  for (std::int64_t i = 0; i < kCount; ++i) {
    double sum = 0;
    for (int rank = 0; rank < context.size(); ++rank) sum += double{all.as<float>()[rank * kCount + i]};
    means[kPhases[i].name] = sum / context.size();
  }
  return means;
}

void print(const RunFlags& flags, const Files& files, const nlohmann::json& result) {
  const std::vector<std::int64_t> load = result["load"];
  std::printf("%s layer %lld: %lld of %lld experts of inner size %lld, hidden size %lld, %s weights\n",
              files.config.family.c_str(), static_cast<long long>(flags.layer),
              static_cast<long long>(files.config.topk), static_cast<long long>(files.config.experts),
              static_cast<long long>(files.config.inner), static_cast<long long>(files.config.hidden),
              std::string(name(files.block.dtype())).c_str());
  std::printf("%lld tokens in %s on %lld ranks\n\n", static_cast<long long>(files.tokens),
              std::string(name(files.dtype)).c_str(), result["ranks"].get<long long>());
  for (const NamedPhase& phase : kForwardPhases)
    std::printf("%-10s %9.3f ms\n", phase.name, result["phase_ms"].value(phase.name, 0.0));
  const auto [least, most] = std::minmax_element(load.begin(), load.end());
  const auto idle = std::count(load.begin(), load.end(), 0);
  std::printf("\nrows per expert: %lld to %lld, max/mean %.2f, %lld experts without any\n",
              static_cast<long long>(*least), static_cast<long long>(*most), result["load_max_over_mean"].get<double>(),
              static_cast<long long>(idle));
}

nlohmann::json run_block(const RunFlags& flags, const Communicator& communicator, const Common& common) {
  const Context context(communicator, common.context_options());
  const Files files(flags);
  MoeLayer layer = load(context, flags, files);

  const std::int64_t first = context.rank() * files.tokens / context.size();
  const std::int64_t count = (context.rank() + 1) * files.tokens / context.size() - first;
  const Array x(files.working(), {count, files.config.hidden});
  if (files.hidden != nullptr) {
    files.hidden->read_rows(first, x);
  } else {
    draw(flags, files.dtype, first, x);
  }
  const Array out(files.working(), x.view().shape());
  barrier(context);  // so that no phase pays for a rank that still reads
  layer.forward(context, x, out);

  const MoeRecord& record = layer.inference_record();
  const auto copies = static_cast<std::size_t>(flags.shared_ranks);  // in the plan they are the first experts
  const std::span<const std::int64_t> load = record.plan.expert_totals().subspan(copies);
  const auto rows = static_cast<double>(std::accumulate(load.begin(), load.end(), std::int64_t{0}));
  const auto most = static_cast<double>(*std::max_element(load.begin(), load.end()));
  nlohmann::json result = {{"ranks", context.size()},
                           {"transport", communicator.transport_name()},
                           {"tokens", files.tokens},
                           {"experts", files.config.experts},
                           {"topk", files.config.topk},
                           {"phase_ms", mean_times(context, layer.take_times())},
                           {"load", load},
                           {"load_max_over_mean", rows > 0 ? most * static_cast<double>(load.size()) / rows : 1.0}};
  if (copies > 0) result["shared_load"] = record.plan.expert_totals().first(copies);
  if (!flags.output.empty()) {
    const Array rounded(files.dtype, out.view().shape());
    convert(out, rounded);
    const Array y = gather(context, rounded, files.tokens);
    const Array ids = gather(context, record.routing.ids, files.tokens);
    const Array weights = gather(context, record.routing.weights, files.tokens);
    if (context.rank() == 0) {
      io::write_safetensors(flags.output,
                            std::vector<io::NamedTensor>{{kHidden, y}, {"topk_ids", ids}, {"topk_weights", weights}});
    }
  }
  if (context.rank() != 0) return nullptr;
  print(flags, files, result);
  return result;
}

}  // namespace

Verb run_verb() {
  auto flags = std::make_shared<RunFlags>();
  Verb verb;
  verb.name = "run";
  verb.help = "Run one MoE block of a Hugging Face checkpoint.";
  verb.add_options = [flags](CLI::App& app) { add_flags(app, *flags); };
  verb.check = [flags](const Common&) { check_flags(*flags); };
  verb.run = [flags](const Communicator& communicator, const Common& common) {
    return run_block(*flags, communicator, common);
  };
  return verb;
}

}  // namespace expar::cli
