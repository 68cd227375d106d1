// Loading a MoE block: every layout on disk gives the same arrays, and a rank reads only what is its own.
#include "io/moe_block.h"

#include <cstring>
#include <map>
#include <sstream>
#include <vector>

#include <expar/random.h>
#include <nlohmann/json.hpp>

#include "safetensors_testing.h"

namespace expar {
namespace {

constexpr std::int64_t kExperts = 7, kHidden = 40, kInner = 33;

/// A model of one layer, each weight drawn by what it is, so that a mix-up shows.
class Model {
 public:
  explicit Model(DType dtype) : dtype_(dtype) {
    add("router", "router", {kExperts, kHidden});
    for (std::int64_t e = 0; e < kExperts; ++e) {
      add("gate" + std::to_string(e), "gate" + std::to_string(e), {kInner, kHidden});
      add("up" + std::to_string(e), "up" + std::to_string(e), {kInner, kHidden});
      add("down" + std::to_string(e), "down" + std::to_string(e), {kHidden, kInner});
    }
  }
  const Array& operator[](const std::string& what) const { return arrays_.at(what); }

  /// The value at `index`, as the checkpoint holds it.
  static float value(DType dtype, const std::string& what, std::int64_t index) {
    const float drawn = Random(1, what).normal(static_cast<std::uint64_t>(index));
    if (dtype == DType::f32) return drawn;
    return dtype == DType::bf16 ? static_cast<float>(bf16(drawn)) : static_cast<float>(f16(drawn));
  }

  std::vector<io::NamedTensor> per_expert(const io::MoeNames& names) const {
    std::vector<io::NamedTensor> all = {{names.router(), arrays_.at("router")}};
    for (std::int64_t e = 0; e < kExperts; ++e) {
      all.push_back({names.gate(e), arrays_.at("gate" + std::to_string(e))});
      all.push_back({names.up(e), arrays_.at("up" + std::to_string(e))});
      all.push_back({names.down(e), arrays_.at("down" + std::to_string(e))});
    }
    return all;
  }

  /// The fused arrays live as long as the model.
  std::vector<io::NamedTensor> fused(const io::MoeNames& names) {
    Array up(dtype_, {kExperts, 2 * kInner, kHidden}), down(dtype_, {kExperts, kHidden, kInner});
    std::byte* to_up = up.view().bytes();
    std::byte* to_down = down.view().bytes();
    const auto append = [&](std::byte*& to, const std::string& what) {
      const Tensor from = arrays_.at(what);
      std::memcpy(to, from.bytes(), from.byte_size());
      to += from.byte_size();
    };
    for (std::int64_t e = 0; e < kExperts; ++e) {
      append(to_up, "gate" + std::to_string(e));
      append(to_up, "up" + std::to_string(e));
      append(to_down, "down" + std::to_string(e));
    }
    arrays_["fused_up"] = std::move(up);
    arrays_["fused_down"] = std::move(down);
    return {{names.router(), arrays_.at("router")},
            {names.fused_up(), arrays_.at("fused_up")},
            {names.fused_down(), arrays_.at("fused_down")}};
  }

 private:
  void add(const std::string& name, const std::string& what, Shape shape) {
    Array array(dtype_, shape);
    for (std::int64_t i = 0; i < shape.elements(); ++i) {
      const float v = value(dtype_, what, i);
      if (dtype_ == DType::f32) array.as<float>()[i] = v;
      if (dtype_ == DType::bf16) array.as<bf16>()[i] = bf16(v);
      if (dtype_ == DType::f16) array.as<f16>()[i] = f16(v);
    }
    arrays_[name] = std::move(array);
  }

  DType dtype_;
  std::map<std::string, Array> arrays_;
};

class MoeBlock : public testing::Test {
 protected:
  void configure(const std::string& family) const {
    nlohmann::json config = {{"model_type", family},
                             {"hidden_size", kHidden},
                             {"num_experts", kExperts},
                             {"num_experts_per_tok", 3},
                             {"num_hidden_layers", 2}};
    config[family == "mixtral" || family == "olmoe" ? "intermediate_size" : "moe_intermediate_size"] = kInner;
    if (family == "qwen2_moe") config["shared_expert_intermediate_size"] = 0;
    directory_.put("config.json", config.dump());
  }
  void save(const std::vector<io::NamedTensor>& tensors) const {
    io::write_safetensors(directory_ / "model.safetensors", tensors);
  }
  std::string refusal(std::int64_t layer = 0) const {
    return refusal_of(directory_, [&] {
      const io::Checkpoint checkpoint(directory_.path());
      io::MoeBlock(checkpoint, io::read_model_config(directory_.path()), layer);
    });
  }

  /// Loads every rank's part for several numbers of ranks and compares each value with what was drawn for it.
  void expect_loads(DType dtype, DType target = DType::f32) const {
    const io::Checkpoint checkpoint(directory_.path());
    const io::MoeBlock block(checkpoint, io::read_model_config(directory_.path()), 0);
    EXPECT_EQ(block.dtype(), dtype == DType::bf16 ? DType::bf16 : DType::f32);
    for (const int ranks : {1, 3, 9}) {
      for (int rank = 0; rank < ranks; ++rank) {
        const ExpertRange range = experts_of(rank, ranks, kExperts);
        Array router(DType::f32, {kExperts, kHidden}), up(target, {range.count, 2 * kInner, kHidden}),
            down(target, {range.count, kHidden, kInner});
        block.load(range, {router, up, down});
        const auto expect = [&](const Array& array, std::int64_t at, const std::string& what, std::int64_t count) {
          for (std::int64_t i = 0; i < count; ++i) {
            const float got =
                target == DType::f32 ? array.as<float>()[at + i] : static_cast<float>(array.as<bf16>()[at + i]);
            ASSERT_EQ(got, Model::value(dtype, what, i)) << what << "[" << i << "] of rank " << rank << "/" << ranks;
          }
        };
        for (std::int64_t i = 0; i < kExperts * kHidden; ++i) {
          ASSERT_EQ(router.as<float>()[i], Model::value(dtype, "router", i));
        }
        constexpr std::int64_t kMatrix = kInner * kHidden;
        for (std::int64_t e = 0; e < range.count; ++e) {
          const std::string name = std::to_string(range.first + e);
          expect(up, 2 * e * kMatrix, "gate" + name, kMatrix);
          expect(up, (2 * e + 1) * kMatrix, "up" + name, kMatrix);
          expect(down, e * kMatrix, "down" + name, kMatrix);
        }
      }
    }
  }

  const Directory directory_;
};

TEST_F(MoeBlock, loads_the_same_arrays_from_every_family_layout_and_dtype) {
  for (const char* family : {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2"}) {
    configure(family);
    const io::MoeNames names = io::moe_names(family, 0);
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      SCOPED_TRACE(std::string(family) + " " + std::string(name(dtype)));
      Model model(dtype);
      save(model.per_expert(names));
      expect_loads(dtype);
      save(model.fused(names));
      expect_loads(dtype);
    }
  }
}

TEST_F(MoeBlock, keeps_bf16_weights_as_they_are_where_the_target_is_bf16) {
  configure("olmoe");
  const Model model(DType::bf16);
  save(model.per_expert(io::moe_names("olmoe", 0)));
  expect_loads(DType::bf16, DType::bf16);
}

TEST_F(MoeBlock, has_the_names_that_transformers_writes) {
  const io::MoeNames mixtral = io::moe_names("mixtral", 3), qwen = io::moe_names("qwen3_moe", 3);
  EXPECT_EQ(mixtral.router(), "model.layers.3.block_sparse_moe.gate.weight");
  EXPECT_EQ(mixtral.gate(5), "model.layers.3.block_sparse_moe.experts.5.w1.weight");
  EXPECT_EQ(mixtral.up(5), "model.layers.3.block_sparse_moe.experts.5.w3.weight");
  EXPECT_EQ(mixtral.down(5), "model.layers.3.block_sparse_moe.experts.5.w2.weight");
  EXPECT_EQ(qwen.router(), "model.layers.3.mlp.gate.weight");
  EXPECT_EQ(qwen.gate(5), "model.layers.3.mlp.experts.5.gate_proj.weight");
  EXPECT_EQ(qwen.up(5), "model.layers.3.mlp.experts.5.up_proj.weight");
  EXPECT_EQ(qwen.down(5), "model.layers.3.mlp.experts.5.down_proj.weight");
  EXPECT_EQ(qwen.fused_up(), "model.layers.3.mlp.experts.gate_up_proj");
  EXPECT_EQ(qwen.fused_down(), "model.layers.3.mlp.experts.down_proj");
}

TEST_F(MoeBlock, is_found_without_the_prefix_of_the_model_and_under_the_names_of_transformers_5) {
  for (const char* block : {"model.layers.0.mlp.", "layers.0.block_sparse_moe.", "layers.0.mlp."}) {
    SCOPED_TRACE(block);
    configure("mixtral");
    Model model(DType::f32);
    for (const auto scheme : {io::MoeNames::Scheme::mixtral, io::MoeNames::Scheme::usual}) {
      save(model.per_expert({block, scheme}));
      expect_loads(DType::f32);
    }
    save(model.fused({block, io::MoeNames::Scheme::mixtral}));
    expect_loads(DType::f32);
  }
}

/// Bytes that this process has read from files so far.
std::int64_t bytes_read() {
  std::ifstream file("/proc/self/io");
  std::string key;
  std::int64_t value = 0;
  file >> key >> value;
  return value;
}

TEST_F(MoeBlock, costs_a_rank_its_own_experts_and_the_router) {
  configure("qwen3_moe");
  Model model(DType::f32);
  for (const auto& tensors :
       {model.per_expert(io::moe_names("qwen3_moe", 0)), model.fused(io::moe_names("qwen3_moe", 0))}) {
    save(tensors);
    const io::Checkpoint checkpoint(directory_.path());
    const io::MoeBlock block(checkpoint, io::read_model_config(directory_.path()), 0);
    Array router(DType::f32, {kExperts, kHidden}), up(DType::f32, {2, 2 * kInner, kHidden}),
        down(DType::f32, {2, kHidden, kInner});
    const std::int64_t first = bytes_read();
    const std::int64_t before = bytes_read();
    const std::int64_t itself = before - first;  // what looking costs, a few digits more or less
    block.load({3, 2}, {router, up, down});
    const auto wanted =
        static_cast<std::int64_t>(router.view().byte_size() + up.view().byte_size() + down.view().byte_size());
    EXPECT_NEAR(static_cast<double>(bytes_read() - before - itself), static_cast<double>(wanted), 32);
  }
}

TEST_F(MoeBlock, may_lie_in_several_shards) {
  configure("qwen3_moe");
  const Model model(DType::bf16);
  nlohmann::json map;
  const auto all = model.per_expert(io::moe_names("qwen3_moe", 0));
  for (std::size_t shard = 0; shard < 3; ++shard) {
    const std::string file = "model-0000" + std::to_string(shard + 1) + "-of-00003.safetensors";
    std::vector<io::NamedTensor> part;
    for (std::size_t i = shard; i < all.size(); i += 3) {
      part.push_back(all[i]);
      map[all[i].name] = file;
    }
    io::write_safetensors(directory_ / file, part);
  }
  directory_.put("model.safetensors.index.json", nlohmann::json{{"weight_map", map}}.dump());
  expect_loads(DType::bf16);
}

TEST_F(MoeBlock, names_what_is_missing_or_does_not_fit) {
  configure("qwen3_moe");
  const io::MoeNames names = io::moe_names("qwen3_moe", 0);
  Model model(DType::f32);
  auto tensors = model.per_expert(names);
  const auto replaced = [&](std::size_t i, const ConstTensor& by) {
    auto changed = tensors;
    changed[i].value = by;
    return changed;
  };
  save({tensors.begin(), tensors.end() - 1});
  EXPECT_EQ(refusal(), "io: model.safetensors has no tensor 'model.layers.0.mlp.experts.6.down_proj.weight'");
  save({tensors.begin() + 1, tensors.end()});
  EXPECT_EQ(refusal(), "io: model.safetensors has no tensor 'model.layers.0.mlp.gate.weight'");
  save(replaced(1, model["down0"]));
  EXPECT_EQ(refusal(),
            "io: model.safetensors: tensor 'model.layers.0.mlp.experts.0.gate_proj.weight' is F32 [40, 33], where "
            "config.json wants [33, 40]");
  save(replaced(0, Array(DType::f32, {6, kHidden})));
  EXPECT_EQ(refusal(),
            "io: model.safetensors: tensor 'model.layers.0.mlp.gate.weight' is F32 [6, 40], where config.json wants "
            "[7, 40]");
  const Array bytes(DType::int8, {kInner, kHidden});
  save(replaced(1, bytes));
  EXPECT_EQ(refusal(),
            "unsupported: model.safetensors: tensor 'model.layers.0.mlp.experts.0.gate_proj.weight' is I8; weights can "
            "be F32, BF16 or F16");
  save(tensors);
  EXPECT_EQ(refusal(2), "bad_argument: config.json: there is no layer 2, only 0 to 1");
  EXPECT_EQ(refusal(1), "io: model.safetensors has no tensor 'model.layers.1.mlp.gate.weight'");
  auto fused = model.fused(names);
  save({fused[0], fused[1]});
  EXPECT_EQ(refusal(), "io: model.safetensors has no tensor 'model.layers.0.mlp.experts.down_proj'");
}

TEST_F(MoeBlock, leaves_out_no_tensor_in_silence) {
  configure("qwen3_moe");
  const Model model(DType::f32);
  const io::MoeNames names = io::moe_names("qwen3_moe", 0);
  const Array extra(DType::f32, {1, kHidden}), nothing(DType::f32, {0, kHidden});
  for (const char* tensor :
       {"shared_expert.up_proj.weight", "shared_expert_gate.weight", "gate.e_score_correction_bias",
        "experts.7.up_proj.weight", "experts.0.up_proj.weight_scale_inv"}) {
    auto tensors = model.per_expert(names);
    tensors.push_back({names.block + tensor, extra});
    save(tensors);
    EXPECT_EQ(refusal(), "unsupported: model.safetensors: qwen3_moe with a tensor 'model.layers.0.mlp." +
                             std::string(tensor) + "' cannot be computed by this version of expar");
    tensors.back() = {"model.layers.1.mlp." + std::string(tensor), extra};
    save(tensors);
    EXPECT_EQ(refusal(), "accepted");
  }
  // transformers writes the shared expert of size 0 like this.
  configure("qwen2_moe");
  auto tensors = model.per_expert(names);
  tensors.push_back({names.block + "shared_expert.up_proj.weight", nothing});
  tensors.push_back({names.block + "shared_expert_gate.weight", extra});
  save(tensors);
  EXPECT_EQ(refusal(), "accepted");
}

TEST_F(MoeBlock, is_refused_where_the_layer_has_no_experts) {
  nlohmann::json config = {{"model_type", "deepseek_v2"},    {"hidden_size", kHidden}, {"n_routed_experts", kExperts},
                           {"num_experts_per_tok", 3},       {"num_hidden_layers", 2}, {"first_k_dense_replace", 1},
                           {"moe_intermediate_size", kInner}};
  directory_.put("config.json", config.dump());
  const Model model(DType::f32);
  save(model.per_expert(io::moe_names("deepseek_v2", 1)));
  EXPECT_EQ(refusal(0), "bad_argument: config.json: layer 0 has no experts");
  EXPECT_EQ(refusal(1), "accepted");
}

TEST_F(MoeBlock, loads_only_into_arrays_that_fit) {
  configure("olmoe");
  const Model model(DType::f32);
  save(model.per_expert(io::moe_names("olmoe", 0)));
  const io::Checkpoint checkpoint(directory_.path());
  const io::MoeBlock block(checkpoint, io::read_model_config(directory_.path()), 0);
  const Array router(DType::f32, {kExperts, kHidden}), up(DType::f32, {2, 2 * kInner, kHidden}),
      down(DType::f32, {2, kHidden, kInner});
  const auto refused = [&](ExpertRange range, const Array& r, const Array& u, const Array& d) {
    return refusal_of(directory_, [&] { block.load(range, {r, u, d}); });
  };
  EXPECT_EQ(refused({0, 2}, router, up, down), "accepted");
  EXPECT_EQ(refused({6, 2}, router, up, down), "bad_argument: 2 experts from expert 6 do not lie inside the model's 7");
  EXPECT_EQ(refused({0, 1}, router, up, down),
            "bad_argument: the array of gate and up has shape [2, 66, 40], not [1, 66, 40]");
  EXPECT_EQ(refused({0, 2}, router, up, up), "bad_argument: the array of down has shape [2, 66, 40], not [2, 40, 33]");
  EXPECT_EQ(refused({0, 2}, up, up, down), "bad_argument: the router has shape [2, 66, 40], not [7, 40]");
}

}  // namespace
}  // namespace expar
