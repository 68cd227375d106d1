// The MoE block of one layer in a checkpoint: what its tensors are called, and loading those of one rank's experts.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <expar/plan.h>
#include <expar/tensor.h>

#include "io/model_config.h"
#include "io/safetensors.h"

namespace expar::io {

/// Names as transformers writes them: each expert on its own, or fused by its version 5 as it holds them in memory.
///   router   [E, H], router_bias [E], selection_bias [E]
///   gate, up [F, H], down [H, F] of expert e, and of all shared experts side by side
///   fused_up [E, 2F, H], gate above up; fused_down [E, H, F]
///   shared_gate [1, H]
/// GPT-OSS's are transposed and interleaved: fused_up [E, H, 2F], column 2f of the gate and 2f + 1 of up; fused_down
/// [E, F, H]; fused_up_bias [E, 2F], interleaved too; fused_down_bias [E, H]. Llama 4's are transposed alone.
struct MoeNames {
  enum class Scheme : std::uint8_t {
    usual,
    mixtral,  // w1, w3, w2 for gate_proj, up_proj, down_proj
    gpt_oss,
    llama4,
  };

  std::string block;  // "model.layers.3.mlp."
  Scheme scheme = Scheme::usual;
  std::string shared = {};  // "shared_expert."

  bool is_transposed() const { return scheme == Scheme::gpt_oss || scheme == Scheme::llama4; }
  std::string router() const { return block + (is_transposed() ? "router.weight" : "gate.weight"); }
  std::string selection_bias() const { return block + "gate.e_score_correction_bias"; }
  std::string router_bias() const { return block + "router.bias"; }
  std::string gate(std::int64_t expert) const { return name(expert, "w1", "gate_proj"); }
  std::string up(std::int64_t expert) const { return name(expert, "w3", "up_proj"); }
  std::string down(std::int64_t expert) const { return name(expert, "w2", "down_proj"); }
  std::string fused_up() const { return block + "experts.gate_up_proj"; }
  std::string fused_down() const { return block + "experts.down_proj"; }
  std::string fused_up_bias() const { return fused_up() + "_bias"; }
  std::string fused_down_bias() const { return fused_down() + "_bias"; }
  std::string shared_matrix(const char* matrix) const { return block + shared + matrix + ".weight"; }
  std::string shared_gate() const { return block + "shared_expert_gate.weight"; }

 private:
  std::string name(std::int64_t expert, const char* of_mixtral, const char* usual) const {
    return block + "experts." + std::to_string(expert) + "." + (scheme == Scheme::mixtral ? of_mixtral : usual) +
           ".weight";
  }
};
/// As checkpoints of the family have them on disk.
MoeNames moe_names(std::string_view family, std::int64_t layer);

/// Where the parameters of a block go, as MoeLayer has them; what a model has not is absent.
struct BlockTargets {
  Tensor router = {}, up = {}, down = {};   // [E, H]; [L, 2F, H], gate above up; [L, H, F]
  Tensor router_bias = {};                  // [E]
  Tensor selection_bias = {};               // [E]
  Tensor up_bias = {}, down_bias = {};      // [L, 2F], [L, H]
  Tensor shared_up = {}, shared_down = {};  // [2F, H], [H, F] with the F of the shared experts
  Tensor shared_gate = {};                  // [H]
};

/// The tensors of a block, found and checked. Valid as long as the checkpoint.
class MoeBlock {
 public:
  /// Looks at names, shapes and dtypes of all experts, so that every rank throws the same; reads no weight.
  /// Throws Error: bad_argument (no such layer, or a dense one), unsupported (see layer_options; a dtype other than
  /// F32, BF16, F16; a tensor in the block that would be left out), io (a tensor that is missing, by name and file, or
  /// whose shape is not the wanted one).
  MoeBlock(const Checkpoint& checkpoint, const ModelConfig& config, std::int64_t layer);

  /// bf16 where all weights of the experts are, else f32, which holds every other dtype exactly.
  DType dtype() const { return dtype_; }

  /// Reads the weights of `experts` and what all ranks hold, and no other byte of the file, in whatever floating dtype
  /// the targets have. Throws Error: bad_argument (a target's shape; experts out of range), io.
  void load(ExpertRange experts, const BlockTargets& to) const;
  /// The same into a layer that was made with layer_options(), expert by expert; refreshes it. Not collective.
  void load(MoeLayer& layer) const;

 private:
  void load_common(const BlockTargets& to) const;
  void load_shared(const BlockTargets& to) const;
  void load_experts(ExpertRange experts, const BlockTargets& to) const;

  struct Expert {
    const StoredTensor *gate, *up, *down;
  };

  ModelConfig config_;
  DType dtype_ = DType::f32;
  const StoredTensor* router_ = nullptr;
  const StoredTensor* router_bias_ = nullptr;     // null: none
  const StoredTensor* selection_bias_ = nullptr;  // null: none
  const StoredTensor* fused_up_ = nullptr;        // null: experts_ instead
  const StoredTensor* fused_down_ = nullptr;
  const StoredTensor* up_bias_ = nullptr;  // null: no biases
  const StoredTensor* down_bias_ = nullptr;
  bool is_transposed_ = false;   // fused_up_ and fused_down_
  bool is_interleaved_ = false;  // the columns of fused_up_, and up_bias_
  std::vector<Expert> experts_;
  Expert shared_{};  // null: none
  const StoredTensor* shared_gate_ = nullptr;
};

}  // namespace expar::io
