// config.json of the families that expar reads: what is understood, what is refused, and by which name.
#include "io/model_config.h"

#include <nlohmann/json.hpp>

#include "safetensors_testing.h"

namespace expar {
namespace {

using Json = nlohmann::json;

Json mixtral() {
  return {{"model_type", "mixtral"}, {"hidden_size", 40},        {"intermediate_size", 33}, {"num_local_experts", 7},
          {"hidden_act", "silu"},    {"num_experts_per_tok", 3}, {"num_hidden_layers", 2}};
}
Json qwen(const char* family) {
  return {{"model_type", family},   {"hidden_size", 40},           {"intermediate_size", 99},
          {"num_experts", 7},       {"moe_intermediate_size", 33}, {"num_experts_per_tok", 3},
          {"num_hidden_layers", 8}, {"decoder_sparse_step", 2},    {"mlp_only_layers", {3}},
          {"norm_topk_prob", true}};
}
Json olmoe() {
  return {{"model_type", "olmoe"}, {"hidden_size", 40},        {"intermediate_size", 33},
          {"num_experts", 7},      {"num_experts_per_tok", 3}, {"num_hidden_layers", 2}};
}
Json deepseek(const char* family) {
  return {{"model_type", family},        {"hidden_size", 40},           {"intermediate_size", 99},
          {"n_routed_experts", 8},       {"moe_intermediate_size", 33}, {"num_experts_per_tok", 3},
          {"num_hidden_layers", 5},      {"first_k_dense_replace", 1},  {"moe_layer_freq", 2},
          {"n_shared_experts", nullptr}, {"topk_method", "greedy"},     {"routed_scaling_factor", 1.0}};
}
Json gpt_oss() {
  return {{"model_type", "gpt_oss"}, {"hidden_size", 40},        {"intermediate_size", 33},
          {"num_local_experts", 8},  {"num_experts_per_tok", 4}, {"num_hidden_layers", 2}};
}
Json with(Json config, const char* key, const Json& value) {
  config[key] = value;
  return config;
}

class ModelConfig : public testing::Test {
 protected:
  io::ModelConfig read(const Json& config) const { return read_text(config.dump()); }
  io::ModelConfig read_text(const std::string& text) const {
    directory_.put("config.json", text);
    return io::read_model_config(directory_.path());
  }
  std::string refusal(const Json& config) const { return refusal_of_text(config.dump()); }
  std::string refusal_of_text(const std::string& text) const {
    return refusal_of(directory_, [&] { io::layer_options(read_text(text), DType::f32); });
  }

  const Directory directory_;
};

TEST_F(ModelConfig, of_mixtral_renormalises_always) {
  const io::ModelConfig config = read(with(mixtral(), "norm_topk_prob", false));
  const MoeLayerOptions options = io::layer_options(config, DType::bf16);
  EXPECT_EQ(options.hidden, 40);
  EXPECT_EQ(options.inner, 33);
  EXPECT_EQ(options.router.experts, 7);
  EXPECT_EQ(options.router.topk, 3);
  EXPECT_TRUE(options.router.renormalise);
  EXPECT_EQ(options.activation, Activation::swiglu);
  EXPECT_FALSE(options.bias);
  EXPECT_EQ(options.dtype, DType::bf16);
  EXPECT_TRUE(config.is_moe(0));
  EXPECT_TRUE(config.is_moe(1));
}

TEST_F(ModelConfig, of_qwen3_has_dense_layers_between) {
  const io::ModelConfig config = read(qwen("qwen3_moe"));
  EXPECT_EQ(io::layer_options(config, DType::f32).inner, 33);
  EXPECT_TRUE(io::layer_options(config, DType::f32).router.renormalise);
  std::string moe;
  for (int layer = 0; layer < 8; ++layer) moe += config.is_moe(layer) ? '1' : '0';
  EXPECT_EQ(moe, "01000101");
  EXPECT_EQ(refusal_of(directory_, [&] { config.is_moe(8); }),
            "bad_argument: config.json: there is no layer 8, only 0 to 7");
  EXPECT_EQ(refusal_of(directory_, [&] { config.is_moe(-1); }),
            "bad_argument: config.json: there is no layer -1, only 0 to 7");
}

TEST_F(ModelConfig, takes_an_absent_norm_topk_prob_for_false) {
  for (Json config : {qwen("qwen3_moe"), olmoe(), deepseek("deepseek_v2")}) {
    config.erase("norm_topk_prob");
    EXPECT_FALSE(io::layer_options(read(config), DType::f32).router.renormalise);
    EXPECT_FALSE(io::layer_options(read(with(config, "norm_topk_prob", nullptr)), DType::f32).router.renormalise);
    EXPECT_TRUE(io::layer_options(read(with(config, "norm_topk_prob", true)), DType::f32).router.renormalise);
  }
}

TEST_F(ModelConfig, knows_the_names_of_every_version_of_transformers) {
  Json config = qwen("qwen3_moe");
  config["num_local_experts"] = config["num_experts"];
  EXPECT_EQ(read(config).experts, 7);
  EXPECT_EQ(refusal(with(config, "num_experts", 8)),
            "io: config.json: it has two values for 'num_local_experts', 8 and 7");
  config.erase("num_experts");
  EXPECT_EQ(read(config).experts, 7);
}

TEST_F(ModelConfig, knows_a_family_by_its_architecture_too) {
  Json config = with(deepseek("kimi_k2"), "architectures", {"DeepseekV3ForCausalLM"});
  EXPECT_EQ(read(config).family, "deepseek_v3");
  config = with(mixtral(), "architectures", {"MixtralForCausalLM"});
  config.erase("model_type");
  EXPECT_EQ(read(config).family, "mixtral");
}

TEST_F(ModelConfig, of_deepseek_v2_runs_where_it_has_nothing_special) {
  const io::ModelConfig config = read(deepseek("deepseek_v2"));
  EXPECT_EQ(io::layer_options(config, DType::f32).router.experts, 8);
  std::string moe;
  for (int layer = 0; layer < 5; ++layer) moe += config.is_moe(layer) ? '1' : '0';
  EXPECT_EQ(moe, "00101");
  Json grouped = with(deepseek("deepseek_v2"), "topk_method", "group_limited_greedy");
  EXPECT_EQ(refusal(grouped), "accepted");
  grouped["n_group"] = 4;
  grouped["topk_group"] = 4;
  EXPECT_EQ(refusal(grouped), "accepted");
  grouped["topk_group"] = 2;
  grouped["routed_scaling_factor"] = 16.5;
  const RouterOptions router = io::layer_options(read(grouped), DType::f32).router;
  EXPECT_EQ(router.score, Score::softmax);
  EXPECT_EQ(router.groups, 4);
  EXPECT_EQ(router.groups_used, 2);
  EXPECT_EQ(router.scaling, 16.5F);
  EXPECT_FALSE(router.selection_bias);
}

TEST_F(ModelConfig, of_deepseek_v3_chooses_by_biased_sigmoids_in_groups) {
  Json config = with(deepseek("deepseek_v3"), "norm_topk_prob", true);
  config["n_group"] = 4;
  config["topk_group"] = 2;
  config["routed_scaling_factor"] = 2.5;
  const RouterOptions router = io::layer_options(read(config), DType::f32).router;
  EXPECT_EQ(router.score, Score::sigmoid);
  EXPECT_EQ(router.groups, 4);
  EXPECT_EQ(router.groups_used, 2);
  EXPECT_EQ(router.scaling, 2.5F);
  EXPECT_TRUE(router.selection_bias);
  EXPECT_TRUE(router.renormalise);
}

TEST_F(ModelConfig, of_llama4_weighs_what_experts_read_and_has_dense_layers_between) {
  Json config = with(mixtral(), "model_type", "llama4_text");
  config["num_experts_per_tok"] = 1;
  config["interleave_moe_layer_step"] = 2;
  const MoeLayerOptions options = io::layer_options(read(config), DType::f32);
  EXPECT_EQ(options.weights_on, WeightsOn::input);
  EXPECT_EQ(options.router.score, Score::sigmoid);
  EXPECT_EQ(options.shared_inner, options.inner);
  EXPECT_FALSE(read(config).is_moe(0));
  EXPECT_TRUE(read(config).is_moe(1));
  config["moe_layers"] = {0};
  EXPECT_TRUE(read(config).is_moe(0));
  EXPECT_FALSE(read(config).is_moe(1));
}

TEST_F(ModelConfig, names_the_family_and_every_feature_that_is_missing) {
  const auto missing = [](const std::string& what) {
    return "unsupported: config.json: " + what + " cannot be computed by this version of expar";
  };
  Json lucky = with(deepseek("deepseek_v2"), "scoring_func", "lucky");
  EXPECT_EQ(refusal(lucky), missing("deepseek_v2 with 'lucky' scores"));
  lucky["quantization_config"] = {{"quant_method", "fp8"}};
  EXPECT_EQ(refusal(lucky), missing("deepseek_v2 with weights quantised as 'fp8' and 'lucky' scores"));
  EXPECT_EQ(refusal(with(mixtral(), "hidden_act", "relu")), missing("mixtral with hidden_act 'relu'"));
}

TEST_F(ModelConfig, of_gpt_oss_has_biases_and_a_clamped_activation) {
  const MoeLayerOptions options = io::layer_options(read(with(gpt_oss(), "swiglu_limit", 5)), DType::f32);
  EXPECT_EQ(options.activation, Activation::swiglu);
  EXPECT_EQ(options.numbers, (ActivationNumbers{.alpha = 1.702F, .limit = 5, .offset = 1}));
  EXPECT_EQ(io::layer_options(read(gpt_oss()), DType::f32).numbers.limit, 7) << "transformers' default";
  EXPECT_TRUE(options.bias);
  EXPECT_TRUE(options.router.bias);
  EXPECT_TRUE(options.router.renormalise);
}

TEST_F(ModelConfig, describes_the_experts_of_each_family) {
  MoeLayerOptions options = io::layer_options(read(with(mixtral(), "hidden_act", "gelu")), DType::f32);
  EXPECT_EQ(options.activation, Activation::geglu);
  EXPECT_EQ(options.shared_inner, 0);
  options = io::layer_options(read(with(qwen("qwen2_moe"), "shared_expert_intermediate_size", 20)), DType::f32);
  EXPECT_EQ(options.shared_inner, 20);
  EXPECT_TRUE(options.shared_gate);
  options = io::layer_options(read(with(qwen("qwen2_moe"), "shared_expert_intermediate_size", 0)), DType::f32);
  EXPECT_EQ(options.shared_inner, 0);
  EXPECT_FALSE(options.shared_gate);
  EXPECT_EQ(io::layer_options(read(qwen("qwen2_moe")), DType::f32).shared_inner, 5632) << "transformers' default";
  options = io::layer_options(read(with(deepseek("deepseek_v2"), "n_shared_experts", 2)), DType::f32);
  EXPECT_EQ(options.shared_inner, 2 * options.inner);
  EXPECT_FALSE(options.shared_gate);
}

TEST_F(ModelConfig, of_another_family_is_refused_by_name) {
  const std::string names = ": mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss, llama4";
  EXPECT_EQ(refusal(with(mixtral(), "model_type", "llama")),
            "unsupported: config.json: model_type 'llama' is not one that expar reads" + names);
  EXPECT_EQ(refusal_of_text("{}"), "unsupported: config.json: model_type '' is not one that expar reads" + names);
}

TEST_F(ModelConfig, says_which_value_makes_no_sense) {
  EXPECT_EQ(refusal_of_text("[]"), "io: config.json: it is not a JSON object");
  EXPECT_EQ(refusal_of_text("{\"a\": 1,}"), "io: config.json is not valid JSON at byte 9");
  EXPECT_EQ(refusal_of_text("{\"a\": NaN}"), "io: config.json is not valid JSON at byte 7");
  EXPECT_EQ(refusal_of_text("{\"a\": 1e999}"), "io: config.json holds a number that is out of range");
  EXPECT_EQ(refusal_of_text("{\"a\": {\"b\": 1, \"b\": 1}}"), "io: config.json has the key 'b' twice");
  EXPECT_EQ(refusal_of_text(std::string("{}\0", 3)), "io: config.json is not valid JSON at byte 3");
  EXPECT_EQ(refusal_of_text(std::string(1'000'000, '[')), "io: config.json nests deeper than 32 levels");
  EXPECT_EQ(refusal_of_text(std::string(16'000'001, ' ')),
            "io: config.json has 16000001 bytes, more than the 16000000 that such a file may have");
  const auto no_number = [](const std::string& name, int least) {
    return "io: config.json: it has no whole number '" + name + "' from " + std::to_string(least);
  };
  for (const Json& wrong : {Json(0), Json(-4), Json(4.5), Json("8"), Json(UINT64_MAX), Json(nullptr), Json::array()}) {
    EXPECT_EQ(refusal(with(mixtral(), "hidden_size", wrong)), no_number("hidden_size", 1)) << wrong;
    EXPECT_EQ(refusal(with(mixtral(), "num_experts_per_tok", wrong)), no_number("num_experts_per_tok", 1)) << wrong;
  }
  EXPECT_EQ(refusal(with(mixtral(), "num_local_experts", nullptr)), no_number("num_experts", 1));
  EXPECT_EQ(refusal(with(deepseek("deepseek_v2"), "n_shared_experts", -1)), no_number("n_shared_experts", 0));
  EXPECT_EQ(refusal(with(mixtral(), "num_experts_per_tok", 8)),
            "io: config.json: its num_experts_per_tok 8 is above its 7 experts");
  EXPECT_EQ(refusal(with(olmoe(), "norm_topk_prob", "yes")), "io: config.json: 'norm_topk_prob' is not true or false");
  EXPECT_EQ(refusal(with(olmoe(), "hidden_act", 3)), "io: config.json: 'hidden_act' is not a string");
  EXPECT_EQ(refusal(with(qwen("qwen3_moe"), "mlp_only_layers", {-1})),
            "io: config.json: 'mlp_only_layers' is not a list of layers");
  EXPECT_EQ(refusal(with(deepseek("deepseek_v2"), "routed_scaling_factor", "2")),
            "io: config.json: 'routed_scaling_factor' is not a number");
  EXPECT_EQ(refusal(with(deepseek("deepseek_v2"), "topk_method", "lucky")),
            "io: config.json: its topk_method 'lucky' is not one of greedy, group_limited_greedy, noaux_tc");
  std::filesystem::remove(directory_ / "config.json");
  EXPECT_EQ(refusal_of(directory_, [&] { io::read_model_config(directory_.path()); }),
            "io: cannot read config.json: No such file or directory");
}

}  // namespace
}  // namespace expar
