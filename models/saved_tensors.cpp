// Names, places and slices of a checkpoint's tensors.
#include "models/saved_tensors.h"

#include <cstring>

#include <expar/collectives.h>

#include "models/batch.h"

namespace expar {
namespace {

constexpr std::int64_t kBytes = 256;

/// Columns [first, first + part.size(1)) of `whole` stand in `part`: copies them there, or from there.
void copy_columns(const Tensor& whole, const Tensor& part, std::int64_t first, bool into_whole) {
  const std::size_t size = size_of(whole.dtype());
  const auto bytes = [&](std::int64_t elements) { return static_cast<std::size_t>(elements) * size; };
  for (std::int64_t row = 0; row < part.size(0); ++row) {
    std::byte* const in_whole = whole.bytes() + bytes(row * whole.size(1) + first);
    std::byte* const in_part = part.bytes() + bytes(row * part.size(1));
    std::memcpy(into_whole ? in_whole : in_part, into_whole ? in_part : in_whole, bytes(part.size(1)));
  }
}

}  // namespace

std::vector<SavedTensor> saved_tensors(const TextModelOptions& model, const Parallel& ranks) {
  const MoeLayerOptions& moe = model.moe;
  const bool low = moe.dtype == DType::bf16;
  std::vector<SavedTensor> all;
  for (std::int64_t place = 0; place < model.context; ++place) {
    const int owner = owner_of(place, ranks.data.size(), model.context);
    const std::int64_t local = place - experts_of(owner, ranks.data.size(), model.context).first;
    all.push_back({.name = "model.embed_places." + std::to_string(place) + ".weight",
                   .shape = {kBytes, moe.hidden},
                   .parameter = "embedding",
                   .first = local * kBytes * moe.hidden,
                   .owner = owner,
                   .here = owner == ranks.data.rank(),
                   .low = low});
  }
  for (std::int64_t layer = 0; layer < model.layers; ++layer) {
    const std::string block = "model.layers." + std::to_string(layer) + ".";
    const std::string parameters = "layers." + std::to_string(layer) + ".";
    all.push_back({.name = block + "post_attention_layernorm.weight",
                   .shape = {moe.hidden},
                   .parameter = "norms",
                   .first = layer * moe.hidden});
    all.push_back({.name = block + "mlp.gate.weight",
                   .shape = {moe.router.experts, moe.hidden},
                   .parameter = parameters + "router.weight"});
    if (moe.router.selection_bias) {
      all.push_back({.name = block + "mlp.gate.e_score_correction_bias",
                     .shape = {moe.router.experts},
                     .parameter = parameters + "selection_bias",
                     .trained = false});
    }
    for (std::int64_t e = 0; e < moe.router.experts; ++e) {
      const int owner = owner_of(e, ranks.experts.size(), moe.router.experts);
      const std::int64_t local = e - experts_of(owner, ranks.experts.size(), moe.router.experts).first;
      const ExpertRange slice = experts_of(ranks.slice(), ranks.slice_count(), moe.inner);
      const std::int64_t each = slice.count * moe.hidden;
      const auto matrix = [&](const char* name, Shape shape, int axis, const char* parameter, std::int64_t first) {
        all.push_back({.name = block + "mlp.experts." + std::to_string(e) + "." + name + ".weight",
                       .shape = shape,
                       .parameter = parameters + parameter,
                       .first = first,
                       .owner = ranks.holder(owner),
                       .here = owner == ranks.experts.rank(),
                       .axis = axis,
                       .slice = slice,
                       .low = low});
      };
      matrix("gate_proj", {moe.inner, moe.hidden}, 0, "experts.up", 2 * local * each);
      matrix("up_proj", {moe.inner, moe.hidden}, 0, "experts.up", (2 * local + 1) * each);
      matrix("down_proj", {moe.hidden, moe.inner}, 1, "experts.down", local * each);
    }
  }
  all.push_back(
      {.name = "model.norm.weight", .shape = {moe.hidden}, .parameter = "norms", .first = model.layers * moe.hidden});
  all.push_back({.name = "lm_head.weight", .shape = {kBytes, moe.hidden}, .parameter = "head", .low = low});
  return all;
}

SavedState::SavedState(TextModel& model, AdamW& optimizer) {
  const std::vector<Parameter> parameters = model.parameters();
  const std::vector<AdamWMoments> moments = optimizer.moments(parameters);
  for (std::size_t i = 0; i < parameters.size(); ++i) parts_[parameters[i].name] = {parameters[i], moments[i]};
  if (!model.options().moe.router.selection_bias) return;
  for (std::size_t layer = 0; layer < static_cast<std::size_t>(model.options().layers); ++layer) {
    parts_["layers." + std::to_string(layer) + ".selection_bias"].parameter.value = model.selection_bias(layer);
  }
}

Tensor SavedState::piece(const SavedTensor& t, const Tensor& all) {
  const Shape shape = t.axis == 0   ? Shape{t.slice.count, t.shape[1]}
                      : t.axis == 1 ? Shape{t.shape[0], t.slice.count}
                                    : t.shape;
  return {all.bytes() + static_cast<std::size_t>(t.first) * size_of(all.dtype()), all.dtype(), shape};
}

Tensor whole_of(const Parallel& ranks, const SavedTensor& t, const Tensor& mine, Buffer& joined, Buffer& whole) {
  const auto flat = [](const Tensor& tensor) { return Tensor(tensor.data(), tensor.dtype(), {tensor.elements()}); };
  const Tensor all = joined.view(mine.dtype(), t.shape);
  all_gather(ranks.all.on(ranks.tensor), flat(mine), flat(all));
  if (t.axis == 0) return all;  // one below the other
  const Tensor result = whole.view(mine.dtype(), t.shape);
  for (int r = 0; r < ranks.slice_count(); ++r) {
    const ExpertRange slice = experts_of(r, ranks.slice_count(), t.shape[1]);
    const std::size_t before = static_cast<std::size_t>(slice.first * t.shape[0]) * size_of(mine.dtype());
    copy_columns(result, Tensor(all.bytes() + before, mine.dtype(), {t.shape[0], slice.count}), slice.first, true);
  }
  return result;
}

void copy_slice(const SavedTensor& t, const Tensor& whole, const Tensor& mine) {
  copy_columns(whole, mine, t.slice.first, false);
}

}  // namespace expar
