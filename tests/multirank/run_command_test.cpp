// expar run on checkpoints of every supported family, against the oracle; the same file for any number of ranks.
#include <cmath>

#include <expar/random.h>

#include "io/moe_block.h"
#include "io/safetensors.h"
#include "tests/multirank/command.h"
#include "tests/multirank/oracle.h"

namespace expar {
namespace {

constexpr std::int64_t kHidden = 40, kInner = 33, kExperts = 7, kTopk = 3, kTokens = 21;  // multiples of nothing

/// Numbers that can be written in `dtype`.
std::vector<float> draw(const std::string& what, std::int64_t count, double scale, DType dtype) {
  const Random random(17, what);
  std::vector<float> values;
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(scale) * random.normal(static_cast<std::uint64_t>(i));
    values.push_back(dtype == DType::bf16 ? static_cast<float>(bf16(value)) : value);
  }
  return values;
}

Array array_of(const std::vector<float>& values, DType dtype, Shape shape) {
  Array array(dtype, shape);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::bf16) {
      array.as<bf16>()[i] = bf16(values[i]);
    } else {
      array.as<float>()[i] = values[i];
    }
  }
  return array;
}

std::vector<double> doubles_of(const ConstTensor& tensor) {
  std::vector<double> values;
  for (std::int64_t i = 0; i < tensor.elements(); ++i) {
    values.push_back(tensor.dtype() == DType::bf16 ? double{static_cast<float>(tensor.as<bf16>()[i])}
                                                   : double{tensor.as<float>()[i]});
  }
  return values;
}

struct Family {
  std::string name, config;
  bool renormalises = false;
  std::int64_t shared = 0;  // inner size of the shared experts
  bool shared_gate = false;
  Activation activation = Activation::swiglu;
  ActivationNumbers numbers = {};
  std::string variant = {};
};

// What each family's own config says of H, F, E, K and of what it could have besides.
const Family kFamilies[] = {
    {"mixtral", R"("intermediate_size": 33, "num_local_experts": 7, "num_experts_per_tok": 3, "hidden_act": "silu")",
     true},
    {"qwen3_moe",
     R"("moe_intermediate_size": 33, "num_experts": 7, "num_experts_per_tok": 3, "hidden_act": "silu",
        "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [])",
     true},
    {"olmoe",
     R"("intermediate_size": 33, "num_experts": 7, "num_experts_per_tok": 3, "hidden_act": "silu",
        "norm_topk_prob": false)",
     false},
    {"qwen2_moe",
     R"("moe_intermediate_size": 33, "num_experts": 7, "num_experts_per_tok": 3, "hidden_act": "silu",
        "shared_expert_intermediate_size": 0, "norm_topk_prob": false, "decoder_sparse_step": 1)",
     false},
    {"deepseek_v2",
     R"("moe_intermediate_size": 33, "n_routed_experts": 7, "num_experts_per_tok": 3, "hidden_act": "silu",
        "n_shared_experts": null, "topk_method": "greedy", "norm_topk_prob": false, "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0, "moe_layer_freq": 1)",
     false},
    {.name = "olmoe",
     .config = R"("intermediate_size": 33, "num_experts": 7, "num_experts_per_tok": 3, "hidden_act": "gelu")",
     .activation = Activation::geglu,
     .variant = "_geglu"},
    {.name = "qwen2_moe",
     .config = R"("moe_intermediate_size": 33, "num_experts": 7, "num_experts_per_tok": 3,
                  "shared_expert_intermediate_size": 21)",
     .shared = 21,
     .shared_gate = true,
     .variant = "_shared"},
    {.name = "deepseek_v2",
     .config = R"("moe_intermediate_size": 33, "n_routed_experts": 7, "num_experts_per_tok": 3,
                  "n_shared_experts": 2)",
     .shared = 66,
     .variant = "_shared"},
    {.name = "gpt_oss",
     .config = R"("intermediate_size": 33, "num_local_experts": 7, "num_experts_per_tok": 3, "swiglu_limit": 0.75)",
     .renormalises = true,
     .numbers = {.alpha = 1.702F, .limit = 0.75F, .offset = 1}},
};

struct Case {
  Family family;
  DType weights = DType::f32, input = DType::f32;
  bool fused = false;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const Family& family : kFamilies) {
    for (const bool fused : {false, true}) {
      if (family.name == "gpt_oss" && !fused) continue;
      for (const DType weights : {DType::f32, DType::bf16}) {
        for (const DType input : {DType::f32, DType::bf16}) all.push_back({family, weights, input, fused});
      }
    }
  }
  return all;
}

std::string case_name(const testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  return c.family.name + c.family.variant + (c.fused ? "_fused_" : "_") + std::string(name(c.weights)) + "_weights_" +
         std::string(name(c.input)) + "_input";
}

class RunCommand : public Command, public testing::WithParamInterface<Case> {
 protected:
  /// Writes model and input; returns the block as the oracle knows it.
  oracle::Layer write_model(const Case& c) const {
    std::filesystem::create_directory(path("model"));
    std::ofstream(path("model/config.json"))
        << R"({"model_type": ")" << c.family.name << R"(", "hidden_size": 40, "num_hidden_layers": 2, )"
        << c.family.config << "}";
    const io::MoeNames names = io::moe_names(c.family.name, 1);
    const std::int64_t each = kInner * kHidden;
    const auto router = draw("router", kExperts * kHidden, 0.4, c.weights);
    const auto gate = draw("gate", kExperts * each, 0.2, c.weights);
    const auto up = draw("up", kExperts * each, 0.2, c.weights);
    const auto down = draw("down", kExperts * each, 0.2, c.weights);

    oracle::Layer layer;
    layer.hidden = kHidden, layer.inner = kInner, layer.topk = kTopk;
    layer.activation = c.family.activation;
    layer.numbers = c.family.numbers;
    layer.renormalise = c.family.renormalises;
    layer.bf16 = c.weights == DType::bf16 && c.input == DType::bf16;
    layer.router.assign(router.begin(), router.end());

    std::vector<Array> arrays;
    std::vector<io::NamedTensor> tensors;
    const auto add = [&](const std::string& name, const std::vector<float>& values, Shape shape) {
      tensors.push_back({name, arrays.emplace_back(array_of(values, c.weights, shape))});
    };
    add(names.router(), router, {kExperts, kHidden});
    std::vector<float> all_up, all_down;
    for (std::int64_t e = 0; e < kExperts; ++e) {
      const auto part = [&](const std::vector<float>& all) {
        return std::vector<float>(all.begin() + e * each, all.begin() + (e + 1) * each);
      };
      const std::vector<float> g = part(gate), u = part(up), d = part(down);
      if (!c.fused) {
        add(names.gate(e), g, {kInner, kHidden});
        add(names.up(e), u, {kInner, kHidden});
        add(names.down(e), d, {kHidden, kInner});
      }
      std::vector<float> both = g;
      both.insert(both.end(), u.begin(), u.end());
      all_up.insert(all_up.end(), both.begin(), both.end());
      all_down.insert(all_down.end(), d.begin(), d.end());
      layer.experts.push_back({{both.begin(), both.end()}, {d.begin(), d.end()}, {}, {}});
    }
    if (c.family.name == "gpt_oss") {
      add_biases(c, layer, all_up, all_down, add);
    } else if (c.fused) {
      add(names.fused_up(), all_up, {kExperts, 2 * kInner, kHidden});
      add(names.fused_down(), all_down, {kExperts, kHidden, kInner});
    }
    if (const std::int64_t inner = c.family.shared; inner > 0) {
      const auto g = draw("shared gate", inner * kHidden, 0.2, c.weights),
                 u = draw("shared up", inner * kHidden, 0.2, c.weights);
      const auto d = draw("shared down", inner * kHidden, 0.2, c.weights);
      add(names.shared_matrix("gate_proj"), g, {inner, kHidden});
      add(names.shared_matrix("up_proj"), u, {inner, kHidden});
      add(names.shared_matrix("down_proj"), d, {kHidden, inner});
      layer.shared.up.assign(g.begin(), g.end());
      layer.shared.up.insert(layer.shared.up.end(), u.begin(), u.end());
      layer.shared.down.assign(d.begin(), d.end());
    }
    if (c.family.shared_gate) {
      const auto g = draw("gate of the shared", kHidden, 0.4, c.weights);
      add(names.shared_gate(), g, {1, kHidden});
      layer.shared_gate.assign(g.begin(), g.end());
    }
    io::write_safetensors(path("model/model.safetensors"), tensors, {{"format", "pt"}});
    return layer;
  }
  /// GPT-OSS: everything has a bias, and matrices are stored transposed, gate and up in alternate columns.
  template <class Add>
  static void add_biases(const Case& c, oracle::Layer& layer, const std::vector<float>& up,
                         const std::vector<float>& down, const Add& add) {
    const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
    const io::MoeNames names = io::moe_names(c.family.name, 1);
    const auto router_bias = draw("router bias", kExperts, 0.4, c.weights);
    const auto up_bias = draw("up bias", kExperts * 2 * kInner, 0.4, c.weights);
    const auto down_bias = draw("down bias", kExperts * kHidden, 0.4, c.weights);
    std::vector<float> up_stored(up.size()), down_stored(down.size()), up_bias_stored(up_bias.size());
    for (std::int64_t e = 0; e < kExperts; ++e) {
      for (std::int64_t n = 0; n < 2 * kInner; ++n) {
        const std::int64_t column = n < kInner ? 2 * n : 2 * (n - kInner) + 1;
        up_bias_stored[at(e * 2 * kInner + column)] = up_bias[at(e * 2 * kInner + n)];
        for (std::int64_t h = 0; h < kHidden; ++h) {
          up_stored[at((e * kHidden + h) * 2 * kInner + column)] = up[at((e * 2 * kInner + n) * kHidden + h)];
        }
      }
      for (std::int64_t f = 0; f < kInner; ++f) {
        for (std::int64_t h = 0; h < kHidden; ++h) {
          down_stored[at((e * kInner + f) * kHidden + h)] = down[at((e * kHidden + h) * kInner + f)];
        }
      }
      oracle::Network& expert = layer.experts[at(e)];
      expert.up_bias.assign(up_bias.begin() + e * 2 * kInner, up_bias.begin() + (e + 1) * 2 * kInner);
      expert.down_bias.assign(down_bias.begin() + e * kHidden, down_bias.begin() + (e + 1) * kHidden);
    }
    layer.router_bias.assign(router_bias.begin(), router_bias.end());
    add(names.router_bias(), router_bias, Shape{kExperts});
    add(names.fused_up(), up_stored, Shape{kExperts, kHidden, 2 * kInner});
    add(names.fused_down(), down_stored, Shape{kExperts, kInner, kHidden});
    add(names.fused_up_bias(), up_bias_stored, Shape{kExperts, 2 * kInner});
    add(names.fused_down_bias(), down_bias, Shape{kExperts, kHidden});
  }
  std::vector<float> write_input(DType dtype) const {
    const auto x = draw("x", kTokens * kHidden, 1.0, dtype);
    const Array array = array_of(x, dtype, {kTokens, kHidden});
    io::write_safetensors(path("x"), std::vector<io::NamedTensor>{{"hidden_states", array}});
    return x;
  }
  std::string flags() const { return "run --model " + path("model") + " --layer 1"; }
};

TEST_P(RunCommand, computes_the_block_on_any_number_of_ranks) {
  const Case& c = GetParam();
  const oracle::Layer layer = write_model(c);
  const std::vector<float> x = write_input(c.input);
  std::string first;
  for (const int ranks : {1, 2, 3, 4}) {
    const std::string y = path("y" + std::to_string(ranks));
    const nlohmann::json result =
        result_of(flags() + " --input " + path("x") + " --output " + y + " --ranks " + std::to_string(ranks));
    EXPECT_EQ(result["tokens"], kTokens);
    EXPECT_EQ(result["load"].size(), static_cast<std::size_t>(kExperts));
    if (ranks == 1) first = contents(y);
    EXPECT_TRUE(contents(y) == first) << ranks << " ranks";
    if (c.family.shared == 0 || ranks == 1 || c.weights == DType::bf16) continue;
    const nlohmann::json apart = result_of(flags() + " --input " + path("x") + " --output " + y + " --shared-ranks 1" +
                                           " --ranks " + std::to_string(ranks));
    EXPECT_EQ(apart["load"], result["load"]);
    EXPECT_EQ(apart["shared_load"], nlohmann::json({kTokens}));
    EXPECT_TRUE(contents(y) == first) << ranks << " ranks, the first for the shared experts";
  }

  const io::SafetensorsFile file(path("y1"));
  const Array out = file.at("hidden_states").read(), ids = file.at("topk_ids").read();
  const std::vector<double> got = doubles_of(out), weights = doubles_of(file.at("topk_weights").read());
  ASSERT_EQ(out.view().dtype(), c.input);
  ASSERT_EQ(ids.view().dtype(), DType::int32);
  ASSERT_EQ(ids.view().shape(), (Shape{kTokens, kTopk}));
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const auto row = x.begin() + t * kHidden;
    const oracle::Token token = forward(layer, {row, row + kHidden}, oracle::Vector(kHidden));
    ASSERT_GT(token.gap, 4) << "the choice of token " << t << " is within rounding: draw other numbers";
    for (std::int64_t k = 0; k < kTopk; ++k) {
      const auto slot = static_cast<std::size_t>(k);
      EXPECT_EQ(ids.as<std::int32_t>()[t * kTopk + k], static_cast<int>(token.ids[slot])) << t << " " << k;
      EXPECT_NEAR(weights[static_cast<std::size_t>(t * kTopk + k)], token.weights[slot].value,
                  4 * token.weights[slot].error);
    }
    for (std::int64_t i = 0; i < kHidden; ++i) {
      const oracle::Real want = token.out[static_cast<std::size_t>(i)];
      const double rounding = c.input == DType::bf16 ? oracle::kBf16 * std::abs(want.value) : 0;
      EXPECT_NEAR(got[static_cast<std::size_t>(t * kHidden + i)], want.value, 4 * want.error + rounding)
          << t << " " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Families, RunCommand, testing::ValuesIn(cases()), case_name);

using RunMistake = RunCommand;

TEST_P(RunMistake, is_told_in_one_sentence) {
  write_model(GetParam());
  write_input(DType::f32);
  std::ofstream(path("no_tensors"), std::ios::binary) << "not safetensors";
  const Array other(DType::f32, {3, kHidden + 1});
  io::write_safetensors(path("narrow"), std::vector<io::NamedTensor>{{"hidden_states", other}, {"other", other}});
  Array nan(DType::f32, {1, kHidden});
  nan.as<float>()[5] = std::nanf("");
  io::write_safetensors(path("nan"), std::vector<io::NamedTensor>{{"hidden_states", nan}});
  io::write_safetensors(path("unnamed"), std::vector<io::NamedTensor>{{"x", nan}});
  const struct {
    std::string arguments;
    int status;
    std::string says;
  } mistakes[] = {
      {"run --layer 1", 2, "--model"},
      {"run --model " + path("missing") + " --layer 1", 7, "missing"},
      {"run --model " + path("model") + " --layer 2", 2, "layer 2"},
      {"run --model " + path("model") + " --layer -1", 2, "--layer = '-1'"},
      {"run --model " + path("model") + " --layer 0", 7, "model.layers.0."},
      {flags() + " --input " + path("no_tensors"), 7, "no_tensors"},
      {flags() + " --input " + path("narrow"), 2, "hidden_states is F32 [3, 41], not [T, 40]"},
      {flags() + " --input " + path("unnamed"), 7, "hidden_states"},
      {flags() + " --input " + path("nan"), 2, "is nan"},
      {flags() + " --input " + path("x") + " --tokens 5", 2, "--tokens is of the random input and contradicts --input"},
      {flags() + " --dtype int8", 2, "--dtype = 'int8'"},
      {flags() + " --output " + path("nowhere/y"), 7, "nowhere"},
  };
  for (const auto& mistake : mistakes) {
    const Finished finished = expar(mistake.arguments + " --ranks 2");
    EXPECT_EQ(finished.status, mistake.status) << mistake.arguments << "\n" << finished.err;
    EXPECT_NE(finished.err.find(mistake.says), std::string::npos) << mistake.arguments << "\n" << finished.err;
    EXPECT_EQ(std::count(finished.err.begin(), finished.err.end(), '\n'), 1) << finished.err;
    EXPECT_EQ(finished.out, "");
  }
}

INSTANTIATE_TEST_SUITE_P(One, RunMistake, testing::Values(Case{kFamilies[1]}), case_name);

}  // namespace
}  // namespace expar
