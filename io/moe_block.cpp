// Finding, checking and reading the tensors of a MoE block.
#include "io/moe_block.h"

#include <algorithm>
#include <set>

#include <expar/error.h>

#include "io/json.h"

namespace expar::io {
namespace {

std::string shape_text(const std::vector<std::int64_t>& extents) {
  std::string text = "[";
  for (std::size_t i = 0; i < extents.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(extents[i]);
  return text + "]";
}

/// The names that this checkpoint uses. Bare models are saved without "model.", and transformers 5 calls Mixtral's
/// block "mlp" as everybody else's.
MoeNames names_in(const Checkpoint& checkpoint, const std::string& family, std::int64_t layer) {
  const MoeNames usual = moe_names(family, layer);
  std::vector<std::string> blocks = {usual.block};
  const std::string base = "layers." + std::to_string(layer) + ".";
  if (usual.is_mixtral) blocks.push_back("model." + base + "mlp.");
  blocks.push_back(usual.block.substr(std::string_view("model.").size()));
  if (usual.is_mixtral) blocks.push_back(base + "mlp.");
  for (const std::string& block : blocks) {
    MoeNames names = usual;
    names.block = block;
    if (checkpoint.find(names.router()) == nullptr) continue;
    if (names.is_mixtral && checkpoint.find(names.gate(0)) == nullptr) {
      MoeNames plain = names;
      plain.is_mixtral = false;
      if (checkpoint.find(plain.gate(0)) != nullptr) return plain;
    }
    return names;
  }
  return usual;
}

const StoredTensor& wanted(const Checkpoint& checkpoint, const std::string& name,
                           const std::vector<std::int64_t>& extents) {
  const StoredTensor& tensor = checkpoint.at(name);
  if (tensor.extents() != extents) {
    throw Error(ErrorCode::io, tensor.path() + ": tensor " + in_quotes(name) + " is " + tensor.str() +
                                   ", where config.json wants " + shape_text(extents));
  }
  const std::string_view dtype = tensor.dtype_name();
  if (dtype != "F32" && dtype != "BF16" && dtype != "F16") {
    throw Error(ErrorCode::unsupported, tensor.path() + ": tensor " + in_quotes(name) + " is " + std::string(dtype) +
                                            "; weights can be F32, BF16 or F16");
  }
  return tensor;
}

void check_target(const char* what, const Tensor& target, const Shape& shape) {
  if (target.shape() == shape) return;
  throw Error(ErrorCode::bad_argument,
              std::string(what) + " has shape " + target.shape().str() + ", not " + shape.str());
}

}  // namespace

MoeNames moe_names(std::string_view family, std::int64_t layer) {
  const bool is_mixtral = family == "mixtral";
  return {"model.layers." + std::to_string(layer) + (is_mixtral ? ".block_sparse_moe." : ".mlp."), is_mixtral};
}

MoeBlock::MoeBlock(const Checkpoint& checkpoint, const ModelConfig& config, std::int64_t layer) : config_(config) {
  if (!config.is_moe(layer)) {
    throw Error(ErrorCode::bad_argument, config.path + ": layer " + std::to_string(layer) + " has no experts");
  }
  (void)layer_options(config, DType::f32);

  const std::int64_t e = config.experts, h = config.hidden, f = config.inner;
  const MoeNames names = names_in(checkpoint, config.family, layer);
  std::vector<const StoredTensor*> weights;
  std::set<std::string_view> used;
  const auto take = [&](const std::string& name, const std::vector<std::int64_t>& extents) {
    const StoredTensor& tensor = wanted(checkpoint, name, extents);
    used.insert(tensor.name());
    return &tensor;
  };
  const auto take_weight = [&](const std::string& name, const std::vector<std::int64_t>& extents) {
    return weights.emplace_back(take(name, extents));
  };
  router_ = take(names.router(), {e, h});
  if (checkpoint.find(names.fused_up()) != nullptr) {
    fused_up_ = take_weight(names.fused_up(), {e, 2 * f, h});
    fused_down_ = take_weight(names.fused_down(), {e, h, f});
  } else {
    for (std::int64_t i = 0; i < e; ++i) {
      experts_.push_back(
          {take_weight(names.gate(i), {f, h}), take_weight(names.up(i), {f, h}), take_weight(names.down(i), {h, f})});
    }
  }
  const bool all_bf16 =
      std::all_of(weights.begin(), weights.end(), [](const StoredTensor* t) { return t->dtype_name() == "BF16"; });
  dtype_ = all_bf16 ? DType::bf16 : DType::f32;

  // A bias, a scale or a shared expert that config.json does not mention would make the result wrong in silence.
  const std::string gate_of_nothing = config.family == "qwen2_moe" ? names.block + "shared_expert_gate.weight" : "";
  for (const SafetensorsFile& file : checkpoint.files()) {
    for (const StoredTensor& tensor : file.tensors()) {
      const bool is_nothing = tensor.bytes().empty() || tensor.name() == gate_of_nothing;
      if (!tensor.name().starts_with(names.block) || used.contains(tensor.name()) || is_nothing) continue;
      throw Error(ErrorCode::unsupported, file.path() + ": " + config.family + " with a tensor " +
                                              in_quotes(tensor.name()) +
                                              " cannot be computed by this version of expar");
    }
  }
}

void MoeBlock::load(ExpertRange experts, Tensor router, Tensor up, Tensor down) const {
  const std::int64_t h = config_.hidden, f = config_.inner;
  if (experts.first < 0 || experts.count < 0 || experts.first > config_.experts ||
      experts.count > config_.experts - experts.first) {
    throw Error(ErrorCode::bad_argument, std::to_string(experts.count) + " experts from expert " +
                                             std::to_string(experts.first) + " do not lie inside the model's " +
                                             std::to_string(config_.experts));
  }
  check_target("the router", router, {config_.experts, h});
  check_target("the array of gate and up", up, {experts.count, 2 * f, h});
  check_target("the array of down", down, {experts.count, h, f});
  router_->read_rows(0, router);
  if (fused_up_ != nullptr) {
    fused_up_->read_rows(experts.first, up);
    fused_down_->read_rows(experts.first, down);
    return;
  }
  const auto matrix = [](const Tensor& all, std::int64_t expert) {
    return Tensor(all.rows(expert, 1).data(), all.dtype(), {all.size(1), all.size(2)});
  };
  for (std::int64_t i = 0; i < experts.count; ++i) {
    const Expert& expert = experts_[static_cast<std::size_t>(experts.first + i)];
    expert.gate->read_rows(0, matrix(up, i).rows(0, f));
    expert.up->read_rows(0, matrix(up, i).rows(f, f));
    expert.down->read_rows(0, matrix(down, i));
  }
}

}  // namespace expar::io
