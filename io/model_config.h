// What config.json of a Hugging Face model says about its MoE blocks.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <expar/layer.h>

namespace expar::io {

/// Families: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss, llama4. Everything that changes
/// what a block computes is here, also what expar cannot compute yet; layer_options() is where that is refused.
struct ModelConfig {
  std::string path;          // of config.json
  std::string family;        // its model_type
  std::int64_t layers = 0;   // 0: not said
  std::int64_t hidden = 0;   // H
  std::int64_t inner = 0;    // F of a routed expert
  std::int64_t experts = 0;  // E
  std::int64_t topk = 0;     // K

  std::string scoring = "softmax";  // or "sigmoid"
  bool norm_topk = false;           // the K scores are divided by their sum
  double scaling = 1.0;             // and multiplied by this
  std::int64_t groups = 1;          // of experts; tokens choose from groups_used of them
  std::int64_t groups_used = 1;
  bool selection_bias = false;  // added to the scores for the choice alone (DeepSeek-V3)
  bool router_bias = false;     // added to the logits (GPT-OSS)

  std::string activation = "silu";  // hidden_act: of the gate
  std::optional<double> limit;      // of gate and up (GPT-OSS)
  bool expert_bias = false;
  std::int64_t shared_inner = 0;  // F of all shared experts together; 0: none
  bool shared_gate = false;       // their output is weighted by a sigmoid (Qwen2-MoE)
  std::string quantization;       // of the stored weights ("fp8"); empty: none

  std::int64_t first_moe_layer = 0;
  std::int64_t moe_every = 1;  // a layer is MoE if layer + moe_phase is a multiple of this
  std::int64_t moe_phase = 0;
  std::vector<std::int64_t> dense_layers;  // that are not MoE all the same

  /// Throws Error: bad_argument (no such layer).
  bool is_moe(std::int64_t layer) const;
};

/// Reads `directory`/config.json.
/// Throws Error: io (cannot be read, is no JSON, lacks a number or has one that makes no sense, by name),
/// unsupported (another family, by name).
ModelConfig read_model_config(const std::string& directory);

/// What MoeLayer needs to compute a block of the model with weights of `dtype` (f32 or bf16).
/// Throws Error: unsupported, naming the family and every feature that expar does not have yet.
MoeLayerOptions layer_options(const ModelConfig& config, DType dtype);

}  // namespace expar::io
