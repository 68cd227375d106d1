// config.json of each family.
#include "io/model_config.h"

#include <algorithm>
#include <filesystem>
#include <initializer_list>

#include <expar/error.h>

#include "io/file.h"
#include "io/json.h"

namespace expar::io {
namespace {

constexpr std::uint64_t kMaxConfig = 16'000'000;
constexpr std::int64_t kMaxExtent = std::int64_t{1} << 31;
constexpr std::string_view kFamilies[] = {"mixtral",     "qwen2_moe",   "qwen3_moe", "olmoe",
                                          "deepseek_v2", "deepseek_v3", "gpt_oss",   "llama4"};

/// The values of an object by name; null counts as absent, as it does in transformers.
class Fields {
 public:
  using Names = std::initializer_list<const char*>;

  Fields(const nlohmann::json& object, const std::string& path) : object_(object), path_(path) {}

  [[noreturn]] void fail(const std::string& text) const { throw Error(ErrorCode::io, path_ + ": " + text); }
  bool has(const char* name) const { return find(name) != nullptr; }

  /// Several names: they are the same thing, and at most one value is given.
  std::int64_t whole(Names names, std::int64_t least, std::optional<std::int64_t> otherwise = {}) const {
    std::optional<std::int64_t> value;
    for (const char* name : names) {
      const nlohmann::json* field = find(name);
      if (field == nullptr) continue;
      // Compared as JSON, so that a number beyond 64 bits is large and not negative.
      if (!field->is_number_integer() || *field < least || *field > kMaxExtent) refuse_whole(name, least);
      const auto number = field->get<std::int64_t>();
      if (value && *value != number) {
        fail("it has two values for " + in_quotes(name) + ", " + std::to_string(*value) + " and " +
             std::to_string(number));
      }
      value = number;
    }
    if (!value && !otherwise) refuse_whole(*names.begin(), least);
    return value ? *value : *otherwise;
  }

  bool flag(const char* name) const {
    const nlohmann::json* field = find(name);
    if (field == nullptr) return false;
    if (!field->is_boolean()) fail(in_quotes(name) + " is not true or false");
    return field->get<bool>();
  }

  double number(const char* name, double otherwise) const {
    const nlohmann::json* field = find(name);
    if (field == nullptr) return otherwise;
    if (!field->is_number()) fail(in_quotes(name) + " is not a number");
    return field->get<double>();
  }

  std::string text(const char* name, const std::string& otherwise) const {
    const nlohmann::json* field = find(name);
    if (field == nullptr) return otherwise;
    if (!field->is_string()) fail(in_quotes(name) + " is not a string");
    return field->get<std::string>();
  }

  std::vector<std::int64_t> layers(const char* name) const {
    const nlohmann::json* field = find(name);
    if (field == nullptr) return {};
    std::vector<std::int64_t> all;
    if (!field->is_array()) fail(in_quotes(name) + " is not a list of layers");
    for (const nlohmann::json& layer : *field) {
      if (!layer.is_number_integer() || layer < 0 || layer > kMaxExtent) {
        fail(in_quotes(name) + " is not a list of layers");
      }
      all.push_back(layer.get<std::int64_t>());
    }
    return all;
  }

  const nlohmann::json* find(const char* name) const {
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

 private:
  [[noreturn]] void refuse_whole(const char* name, std::int64_t least) const {
    fail("it has no whole number " + in_quotes(name) + " from " + std::to_string(least));
  }

  const nlohmann::json& object_;
  const std::string& path_;
};

/// By model_type; by architecture where that is none of ours, for models that are others under another name.
std::string family_of(const Fields& fields) {
  std::string type = fields.text("model_type", "");
  if (type == "llama4_text") type = "llama4";
  if (std::find(std::begin(kFamilies), std::end(kFamilies), type) != std::end(kFamilies)) return type;
  struct Architecture {
    std::string_view name, family;
  };
  constexpr Architecture kArchitectures[] = {
      {"MixtralForCausalLM", "mixtral"},        {"Qwen2MoeForCausalLM", "qwen2_moe"},
      {"Qwen3MoeForCausalLM", "qwen3_moe"},     {"OlmoeForCausalLM", "olmoe"},
      {"DeepseekV2ForCausalLM", "deepseek_v2"}, {"DeepseekV3ForCausalLM", "deepseek_v3"},
      {"GptOssForCausalLM", "gpt_oss"},         {"Llama4ForCausalLM", "llama4"}};
  if (const nlohmann::json* list = fields.find("architectures"); list != nullptr && list->is_array()) {
    for (const Architecture& architecture : kArchitectures) {
      if (std::find(list->begin(), list->end(), architecture.name) != list->end()) {
        return std::string(architecture.family);
      }
    }
  }
  return type;
}

void read_qwen(const Fields& fields, ModelConfig& config) {
  config.inner = fields.whole({"moe_intermediate_size"}, 1);
  config.norm_topk = fields.flag("norm_topk_prob");
  config.moe_every = fields.whole({"decoder_sparse_step"}, 1, 1);
  config.moe_phase = 1;
  config.dense_layers = fields.layers("mlp_only_layers");
  if (config.family == "qwen2_moe") {
    config.shared_inner = fields.whole({"shared_expert_intermediate_size"}, 0, 5632);  // the default of transformers
    config.shared_gate = config.shared_inner > 0;
  }
}

void read_deepseek(const Fields& fields, ModelConfig& config) {
  const bool is_v3 = config.family == "deepseek_v3";
  config.inner = fields.whole({"moe_intermediate_size"}, 1);
  config.norm_topk = fields.flag("norm_topk_prob");
  config.scaling = fields.number("routed_scaling_factor", 1.0);
  config.shared_inner = fields.whole({"n_shared_experts"}, 0, 0) * config.inner;
  config.first_moe_layer = fields.whole({"first_k_dense_replace"}, 0, 0);
  config.moe_every = fields.whole({"moe_layer_freq"}, 1, 1);
  // V3 has nothing but biased sigmoids in groups, whatever these fields say.
  config.scoring = is_v3 ? "sigmoid" : fields.text("scoring_func", "softmax");
  config.selection_bias = is_v3;
  const std::string method = is_v3 ? "noaux_tc" : fields.text("topk_method", "greedy");
  if (method != "greedy" && method != "group_limited_greedy" && method != "noaux_tc") {
    fields.fail("its topk_method " + in_quotes(method) + " is not one of greedy, group_limited_greedy, noaux_tc");
  }
  if (method == "noaux_tc") config.selection_bias = true;
  if (method != "greedy") {
    config.groups = fields.whole({"n_group"}, 1, 1);
    config.groups_used = fields.whole({"topk_group"}, 1, config.groups);
  }
}

void read_llama4(const Fields& fields, ModelConfig& config) {
  config.shared_inner = config.inner;
  const std::vector<std::int64_t> moe = fields.layers("moe_layers");
  for (std::int64_t layer = 0; !moe.empty() && layer < config.layers; ++layer) {
    if (std::find(moe.begin(), moe.end(), layer) == moe.end()) config.dense_layers.push_back(layer);
  }
  if (moe.empty()) config.moe_every = fields.whole({"interleave_moe_layer_step"}, 1, 1);
  config.moe_phase = moe.empty() ? 1 : 0;
}

void read_family(const Fields& fields, ModelConfig& config) {
  if (config.family.starts_with("qwen")) return read_qwen(fields, config);
  if (config.family.starts_with("deepseek")) return read_deepseek(fields, config);
  config.inner = fields.whole({"intermediate_size"}, 1);
  if (config.family == "llama4") return read_llama4(fields, config);
  // GPT-OSS takes the softmax of the chosen logits alone, which is the same.
  config.norm_topk = config.family == "olmoe" ? fields.flag("norm_topk_prob") : true;
  if (config.family == "gpt_oss") {
    config.limit = fields.number("swiglu_limit", 7.0);  // the default of transformers
    config.router_bias = config.expert_bias = true;
  }
}

/// What expar has not yet, in words.
std::vector<std::string> missing_features(const ModelConfig& config) {
  std::vector<std::string> missing;
  const auto add = [&](bool lacks, const std::string& what) {
    if (lacks) missing.push_back(what);
  };
  add(!config.quantization.empty(), "weights quantised as " + in_quotes(config.quantization));
  add(config.scoring != "softmax" && config.scoring != "sigmoid", in_quotes(config.scoring) + " scores");
  add(config.activation != "silu" && config.activation != "gelu", "hidden_act " + in_quotes(config.activation));
  return missing;
}

RouterOptions router_of(const ModelConfig& config) {
  if (config.family == "llama4") return router_preset("llama4", config.experts, config.topk);
  RouterOptions router;
  router.experts = config.experts;
  router.topk = config.topk;
  router.score = config.scoring == "sigmoid" ? Score::sigmoid : Score::softmax;
  router.renormalise = config.norm_topk;
  router.scaling = static_cast<float>(config.scaling);
  router.groups = config.groups;
  router.groups_used = config.groups_used;
  router.selection_bias = config.selection_bias;
  router.bias = config.router_bias;
  return router;
}

}  // namespace

bool ModelConfig::is_moe(std::int64_t layer) const {
  if (layer < 0 || layer >= layers) {
    throw Error(ErrorCode::bad_argument,
                path + ": there is no layer " + std::to_string(layer) + ", only 0 to " + std::to_string(layers - 1));
  }
  return layer >= first_moe_layer && (layer + moe_phase) % moe_every == 0 &&
         std::find(dense_layers.begin(), dense_layers.end(), layer) == dense_layers.end();
}

ModelConfig read_model_config(const std::string& directory) {
  ModelConfig config;
  config.path = (std::filesystem::path(directory) / "config.json").string();
  const nlohmann::json json = parse_json(read_text(config.path, kMaxConfig), config.path);
  if (!json.is_object()) throw Error(ErrorCode::io, config.path + ": it is not a JSON object");
  const Fields fields(json, config.path);
  config.family = family_of(fields);
  if (std::find(std::begin(kFamilies), std::end(kFamilies), config.family) == std::end(kFamilies)) {
    std::string names;
    for (const std::string_view family : kFamilies) names += (names.empty() ? "" : ", ") + std::string(family);
    throw Error(ErrorCode::unsupported,
                config.path + ": model_type " + in_quotes(config.family) + " is not one that expar reads: " + names);
  }
  config.layers = fields.whole({"num_hidden_layers"}, 1, 0);
  config.hidden = fields.whole({"hidden_size"}, 1);
  // Which of these names a family uses has changed with the versions of transformers.
  config.experts = fields.whole({"num_experts", "num_local_experts", "n_routed_experts"}, 1);
  config.topk = fields.whole({"num_experts_per_tok"}, 1);
  if (config.topk > config.experts) {
    fields.fail("its num_experts_per_tok " + std::to_string(config.topk) + " is above its " +
                std::to_string(config.experts) + " experts");
  }
  config.activation = fields.text("hidden_act", "silu");
  if (config.activation == "swish") config.activation = "silu";
  if (const nlohmann::json* quantization = fields.find("quantization_config")) {
    const auto method = quantization->is_object() ? quantization->find("quant_method") : quantization->end();
    config.quantization = method != quantization->end() && method->is_string() ? method->get<std::string>() : "unknown";
  }
  read_family(fields, config);
  return config;
}

MoeLayerOptions layer_options(const ModelConfig& config, DType dtype) {
  const std::vector<std::string> missing = missing_features(config);
  if (!missing.empty()) {
    std::string list = missing[0];
    for (std::size_t i = 1; i < missing.size(); ++i) list += (i + 1 < missing.size() ? ", " : " and ") + missing[i];
    throw Error(ErrorCode::unsupported,
                config.path + ": " + config.family + " with " + list + " cannot be computed by this version of expar");
  }
  MoeLayerOptions options;
  options.hidden = config.hidden;
  options.inner = config.inner;
  options.router = router_of(config);
  if (config.family == "llama4") options.weights_on = WeightsOn::input;
  options.activation = config.activation == "gelu" ? Activation::geglu : Activation::swiglu;
  if (config.limit) {
    options.numbers = {.alpha = 1.702F, .limit = static_cast<float>(*config.limit), .offset = 1};
  }
  options.bias = config.expert_bias;
  options.shared_inner = config.shared_inner;
  options.shared_gate = config.shared_gate;
  options.dtype = dtype;
  return options;
}

}  // namespace expar::io
