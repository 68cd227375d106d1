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
  const bool is_mixtral = usual.scheme == MoeNames::Scheme::mixtral;
  std::vector<std::string> blocks = {usual.block};
  const std::string base = "layers." + std::to_string(layer) + ".";
  if (is_mixtral) blocks.push_back("model." + base + "mlp.");
  blocks.push_back(usual.block.substr(std::string_view("model.").size()));
  if (is_mixtral) blocks.push_back(base + "mlp.");
  for (const std::string& block : blocks) {
    MoeNames names = usual;
    names.block = block;
    if (checkpoint.find(names.router()) == nullptr) continue;
    if (is_mixtral && checkpoint.find(names.gate(0)) == nullptr) {
      MoeNames plain = names;
      plain.scheme = MoeNames::Scheme::usual;
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

/// Row `index` of the outermost axis, without that axis.
Tensor part(const Tensor& all, std::int64_t index) {
  const Tensor row = all.rows(index, 1);
  return all.shape().rank() == 3 ? Tensor(row.data(), all.dtype(), {all.size(1), all.size(2)})
                                 : Tensor(row.data(), all.dtype(), {all.size(1)});
}

/// to[c, r] = from[r, c]; with `pairs` the even columns come first, then the odd ones.
template <class T>
void transpose(const T* from, std::int64_t rows, std::int64_t columns, bool pairs, T* to) {
  for (std::int64_t c = 0; c < columns; ++c) {
    const std::int64_t source = !pairs ? c : c < columns / 2 ? 2 * c : 2 * (c - columns / 2) + 1;
    for (std::int64_t r = 0; r < rows; ++r) to[c * rows + r] = from[r * columns + source];
  }
}

/// Reads expert `first` and those behind it, each transposed, into the parts of `to`.
void read_transposed(const StoredTensor& stored, std::int64_t first, bool pairs, const Tensor& to) {
  const bool is_matrix = to.shape().rank() == 3;
  const std::int64_t columns = to.size(1), rows = is_matrix ? to.size(2) : 1;
  const Array staged(to.dtype(), is_matrix ? Shape{1, rows, columns} : Shape{1, columns});
  for (std::int64_t e = 0; e < to.size(0); ++e) {
    stored.read_rows(first + e, staged);
    const Tensor target = part(to, e);
    switch (to.dtype()) {
      case DType::f32:
        transpose(staged.as<float>(), rows, columns, pairs, target.as<float>());
        break;
      case DType::bf16:
        transpose(staged.as<bf16>(), rows, columns, pairs, target.as<bf16>());
        break;
      default:
        transpose(staged.as<f16>(), rows, columns, pairs, target.as<f16>());
        break;
    }
  }
}

}  // namespace

MoeNames moe_names(std::string_view family, std::int64_t layer) {
  MoeNames names;
  const char* block = ".mlp.";
  if (family == "mixtral") {
    names.scheme = MoeNames::Scheme::mixtral;
    block = ".block_sparse_moe.";
  } else if (family == "gpt_oss") {
    names.scheme = MoeNames::Scheme::gpt_oss;
  } else if (family == "llama4") {
    names.scheme = MoeNames::Scheme::llama4;
    block = ".feed_forward.";
  }
  names.block = "model.layers." + std::to_string(layer) + block;
  names.shared = family.starts_with("deepseek") ? "shared_experts." : "shared_expert.";
  return names;
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
  if (config.router_bias) router_bias_ = take(names.router_bias(), {e});
  if (config.selection_bias) selection_bias_ = take(names.selection_bias(), {e});
  is_transposed_ = names.is_transposed();
  is_interleaved_ = names.scheme == MoeNames::Scheme::gpt_oss;
  if (is_transposed_) {
    fused_up_ = take_weight(names.fused_up(), {e, h, 2 * f});
    fused_down_ = take_weight(names.fused_down(), {e, f, h});
  } else if (checkpoint.find(names.fused_up()) != nullptr) {
    fused_up_ = take_weight(names.fused_up(), {e, 2 * f, h});
    fused_down_ = take_weight(names.fused_down(), {e, h, f});
  } else {
    for (std::int64_t i = 0; i < e; ++i) {
      experts_.push_back(
          {take_weight(names.gate(i), {f, h}), take_weight(names.up(i), {f, h}), take_weight(names.down(i), {h, f})});
    }
  }
  if (config.expert_bias) {
    up_bias_ = take(names.fused_up_bias(), {e, 2 * f});
    down_bias_ = take(names.fused_down_bias(), {e, h});
  }
  if (const std::int64_t inner = config.shared_inner; inner > 0) {
    shared_ = {take_weight(names.shared_matrix("gate_proj"), {inner, h}),
               take_weight(names.shared_matrix("up_proj"), {inner, h}),
               take_weight(names.shared_matrix("down_proj"), {h, inner})};
    if (config.shared_gate) shared_gate_ = take(names.shared_gate(), {1, h});
  }
  const bool all_bf16 =
      std::all_of(weights.begin(), weights.end(), [](const StoredTensor* t) { return t->dtype_name() == "BF16"; });
  dtype_ = all_bf16 ? DType::bf16 : DType::f32;

  // A bias, a scale or a shared expert that config.json does not mention would make the result wrong in silence.
  const std::string gate_of_nothing = config.family == "qwen2_moe" ? names.shared_gate() : "";
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

void MoeBlock::load(ExpertRange experts, const BlockTargets& to) const {
  if (experts.first < 0 || experts.count < 0 || experts.first > config_.experts ||
      experts.count > config_.experts - experts.first) {
    throw Error(ErrorCode::bad_argument, std::to_string(experts.count) + " experts from expert " +
                                             std::to_string(experts.first) + " do not lie inside the model's " +
                                             std::to_string(config_.experts));
  }
  load_common(to);
  load_shared(to);
  load_experts(experts, to);
}

/// What every rank holds.
void MoeBlock::load_common(const BlockTargets& to) const {
  check_target("the router", to.router, {config_.experts, config_.hidden});
  router_->read_rows(0, to.router);
  if (router_bias_ != nullptr) {
    check_target("the router's bias", to.router_bias, {config_.experts});
    router_bias_->read_rows(0, to.router_bias);
  }
  if (selection_bias_ != nullptr) {
    check_target("the selection bias", to.selection_bias, {config_.experts});
    selection_bias_->read_rows(0, to.selection_bias);
  }
  if (shared_gate_ == nullptr) return;
  check_target("the gate of the shared experts", to.shared_gate, {config_.hidden});
  shared_gate_->read_rows(0, Tensor(to.shared_gate.data(), to.shared_gate.dtype(), {1, config_.hidden}));
}

void MoeBlock::load_experts(ExpertRange experts, const BlockTargets& to) const {
  const std::int64_t h = config_.hidden, f = config_.inner;
  check_target("the array of gate and up", to.up, {experts.count, 2 * f, h});
  check_target("the array of down", to.down, {experts.count, h, f});
  if (up_bias_ != nullptr) {
    check_target("the bias of gate and up", to.up_bias, {experts.count, 2 * f});
    check_target("the bias of down", to.down_bias, {experts.count, h});
    read_transposed(*up_bias_, experts.first, true, to.up_bias);
    down_bias_->read_rows(experts.first, to.down_bias);
  }
  if (is_transposed_) {
    read_transposed(*fused_up_, experts.first, is_interleaved_, to.up);
    read_transposed(*fused_down_, experts.first, false, to.down);
    return;
  }
  if (fused_up_ != nullptr) {
    fused_up_->read_rows(experts.first, to.up);
    fused_down_->read_rows(experts.first, to.down);
    return;
  }
  for (std::int64_t i = 0; i < experts.count; ++i) {
    const Expert& expert = experts_[static_cast<std::size_t>(experts.first + i)];
    expert.gate->read_rows(0, part(to.up, i).rows(0, f));
    expert.up->read_rows(0, part(to.up, i).rows(f, f));
    expert.down->read_rows(0, part(to.down, i));
  }
}

void MoeBlock::load_shared(const BlockTargets& to) const {
  const std::int64_t h = config_.hidden, inner = config_.shared_inner;
  if (inner == 0) return;
  check_target("gate and up of the shared experts", to.shared_up, {2 * inner, h});
  check_target("down of the shared experts", to.shared_down, {h, inner});
  shared_.gate->read_rows(0, to.shared_up.rows(0, inner));
  shared_.up->read_rows(0, to.shared_up.rows(inner, inner));
  shared_.down->read_rows(0, to.shared_down);
}

void MoeBlock::load(MoeLayer& layer) const {
  const std::int64_t h = config_.hidden, f = config_.inner, inner = config_.shared_inner;
  BlockTargets to;
  for (const Parameter& p : layer.dense_parameters("")) {
    if (p.name == "router.weight") to.router = p.value;
    if (p.name == "router.bias") to.router_bias = p.value;
  }
  to.selection_bias = layer.selection_bias();
  const DType dtype = layer.options().inference ? layer.options().dtype : DType::f32;  // what the layer keeps
  const Array up(dtype, {2 * inner, h}), down(dtype, {h, inner}), gate(DType::f32, {h});
  to.shared_up = up;
  to.shared_down = down;
  to.shared_gate = gate;
  load_common(to);
  if (layer.holds_shared()) load_shared(to);
  if (inner > 0) layer.write_shared(up, down, shared_gate_ == nullptr ? ConstTensor() : gate);

  // One expert at a time, so that there is no second copy of all.
  const Array one_up(dtype, {1, 2 * f, h}), one_down(dtype, {1, h, f});
  const Array up_bias(DType::f32, {1, 2 * f}), down_bias(DType::f32, {1, h});
  to.up = one_up;
  to.down = one_down;
  to.up_bias = up_bias;
  to.down_bias = down_bias;
  const ExpertRange experts = layer.local_experts();
  for (std::int64_t e = experts.first; e < experts.first + experts.count; ++e) {
    load_experts({e, 1}, to);
    layer.write_expert(e, {part(one_up, 0), part(one_down, 0), part(up_bias, 0), part(down_bias, 0)});
  }
  layer.refresh();
}

}  // namespace expar::io
