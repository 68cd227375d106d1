// Metadata and config.json of checkpoints, written and read back.
#include "models/description.h"

#include <algorithm>
#include <charconv>
#include <iterator>

namespace expar {
namespace {

constexpr std::int64_t kVocabulary = 256;

template <class Number>
std::string text_of(Number value) {
  char text[64];
  const auto result = std::to_chars(std::begin(text), std::end(text), value);  // the shortest that reads back the same
  return {text, result.ptr};
}

/// Calls visit(name, value) for each number that a training was set up with.
template <class Options, class Visit>
void visit_numbers(Options& options, Visit visit) {
  visit_extents(options, visit);
  visit_settings(options, visit);
}

std::string key_of(std::string_view name) { return "expar." + std::string(name); }
// Only where there is a capacity.
constexpr std::string_view kCapacityFactor = "capacity_factor", kCapacityPolicy = "capacity_policy";

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Error(ErrorCode::io, path + ": " + what);
}

class Description {
 public:
  explicit Description(const io::SafetensorsFile& file) : file_(file) {}
  bool has(std::string_view name) const { return file_.metadata().contains(key_of(name)); }
  const std::string& text(std::string_view name) const {
    const auto found = file_.metadata().find(key_of(name));
    if (found == file_.metadata().end()) {
      refuse(file_.path(), "not a checkpoint of expar train: its metadata has no \"" + key_of(name) + "\"");
    }
    return found->second;
  }
  template <class Number>
  void number(std::string_view name, Number& value) const {
    const std::string& said = text(name);
    const auto result = std::from_chars(said.data(), said.data() + said.size(), value);
    if (result.ec == std::errc() && result.ptr == said.data() + said.size()) return;
    refuse(file_.path(), "its metadata says " + key_of(name) + " = \"" + said + "\", which is no such number");
  }

 private:
  const io::SafetensorsFile& file_;
};

/// The family whose names and router the blocks have.
enum class Family : std::uint8_t { qwen3_moe, deepseek_v3, none };

Family family_of(const MoeLayerOptions& moe) {
  const RouterOptions& router = moe.router;
  const bool plain_experts = !moe.bias && moe.activation == Activation::swiglu && moe.numbers == ActivationNumbers{} &&
                             moe.shared_inner == 0 && moe.special.count() == 0 && moe.weights_on == WeightsOn::output;
  // Who does not train goes by the plain logits where Sinkhorn trained, which have the order of the scores.
  const bool by_scores = router.choice == Choice::scores || router.choice == Choice::sinkhorn;
  if (!plain_experts || router.bias || !by_scores) return Family::none;
  if (router.score == Score::sigmoid && router.selection_bias) return Family::deepseek_v3;
  const bool is_plain = router.score == Score::softmax && !router.selection_bias && router.scaling == 1.0F &&
                        router.groups_used == router.groups;
  return is_plain ? Family::qwen3_moe : Family::none;
}

}  // namespace

io::Metadata describe(const TrainOptions& options, std::int64_t step, const std::string& optimizer) {
  io::Metadata metadata{{"format", "pt"},
                        {key_of("step"), text_of(step)},
                        {key_of("optimizer"), optimizer},
                        {key_of("dtype"), std::string(name(options.model.moe.dtype))},
                        {key_of("router"), options.router}};
  visit_numbers(options, [&](const char* name, const auto& value) { metadata[key_of(name)] = text_of(value); });
  const CapacityOptions& capacity = options.model.moe.capacity;
  if (capacity.policy != CapacityPolicy::none) {
    metadata[key_of(kCapacityFactor)] = text_of(capacity.factor);
    metadata[key_of(kCapacityPolicy)] = name(capacity.policy);
  }
  return metadata;
}

SavedTraining read_description(const io::SafetensorsFile& file) {
  const Description description(file);
  SavedTraining saved;
  description.number("step", saved.step);
  saved.optimizer = description.text("optimizer");
  visit_extents(saved.options, [&](const char* name, auto& value) { description.number(name, value); });
  const std::string& router = description.text("router");
  const auto names = router_names();
  if (std::find(names.begin(), names.end(), router) == names.end()) {
    refuse(file.path(), "its metadata says expar.router = \"" + router + "\", which is not a router that expar trains");
  }
  choose_router(saved.options, router);
  visit_settings(saved.options, [&](const char* name, auto& value) { description.number(name, value); });
  const std::string& dtype = description.text("dtype");
  if (dtype != "f32" && dtype != "bf16") {
    refuse(file.path(), "its metadata says expar.dtype = \"" + dtype + "\", which is neither f32 nor bf16");
  }
  saved.options.model.moe.dtype = parse_dtype(dtype);
  saved.options.steps = saved.step + 1;
  try {
    CapacityOptions& capacity = saved.options.model.moe.capacity;
    if (description.has(kCapacityPolicy)) {
      capacity.policy = parse_capacity_policy(description.text(kCapacityPolicy));
      description.number(kCapacityFactor, capacity.factor);
    }
    validate(saved.options);
  } catch (const Error& error) {
    refuse(file.path(), "its metadata says what cannot be: " + error.message());
  }
  if (saved.optimizer.find('/') != std::string::npos) {
    refuse(file.path(), "its optimizer file \"" + saved.optimizer + "\" is not a name in the same directory");
  }
  return saved;
}

bool has_config(const MoeLayerOptions& moe) { return family_of(moe) != Family::none; }

std::string config_of(const TextModelOptions& model) {
  const MoeLayerOptions& moe = model.moe;
  const RouterOptions& router = moe.router;
  const bool is_deepseek = family_of(moe) == Family::deepseek_v3;
  const std::string dtype = moe.dtype == DType::bf16 ? "bfloat16" : "float32";
  std::string text = "{\n";
  const auto line = [&](const char* key, const std::string& value) {
    text += "  \"" + std::string(key) + "\": " + value + ",\n";
  };
  line("architectures", is_deepseek ? "[\"DeepseekV3ForCausalLM\"]" : "[\"Qwen3MoeForCausalLM\"]");
  line("model_type", is_deepseek ? "\"deepseek_v3\"" : "\"qwen3_moe\"");
  line("hidden_size", text_of(moe.hidden));
  line("moe_intermediate_size", text_of(moe.inner));
  line(is_deepseek ? "n_routed_experts" : "num_experts", text_of(router.experts));
  line("num_experts_per_tok", text_of(router.topk));
  line("norm_topk_prob", router.renormalise ? "true" : "false");
  if (is_deepseek) {
    line("scoring_func", "\"sigmoid\"");
    line("topk_method", "\"noaux_tc\"");
    line("n_group", text_of(router.groups));
    line("topk_group", text_of(router.groups_used));
    line("routed_scaling_factor", text_of(router.scaling));
    line("n_shared_experts", "0");
    line("first_k_dense_replace", "0");
    line("moe_layer_freq", "1");
  } else {
    line("decoder_sparse_step", "1");
    line("mlp_only_layers", "[]");
  }
  line("hidden_act", "\"silu\"");
  line("num_hidden_layers", text_of(model.layers));
  line("rms_norm_eps", "1e-05");
  line("vocab_size", text_of(kVocabulary));
  line("tie_word_embeddings", "false");
  return text + "  \"torch_dtype\": \"" + dtype + "\"\n}\n";
}

}  // namespace expar
