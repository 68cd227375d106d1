// The experts' rows summed for their tokens, with what is added to them.
#include <string>
#include <vector>

#include <expar/ascend/permutation.h>

#include "src/ascend/elements.h"
#include "src/ascend/order.h"
#include "src/util/ranges.h"

namespace expar::ascend {
namespace {

constexpr std::int64_t kGrain = 16;  // tokens per task

/// The slots of moe_finalize_routing, checked.
class FinalSlots {
 public:
  explicit FinalSlots(const FinalizeRoutingInputs& inputs) : inputs_(inputs) {
    const ConstTensor& rows = inputs.expanded_permuted_rows;
    require_range("drop_pad_mode", inputs.drop_pad_mode, 0, 3);
    require_axes("expanded_permuted_rows", rows, drops() ? 3 : 2);
    require_numbers("expanded_permuted_rows", rows);
    width_ = rows.size(drops() ? 2 : 1);
    const ConstTensor& places = inputs.expanded_src_to_dst_row;
    require_axes("expanded_src_to_dst_row", places, 1);
    require("expanded_src_to_dst_row", places, DType::int32, places.shape());
    check_scales(places.size(0));
    check_added();
    count_ = drops() ? rows.size(0) * rows.size(1) : rows.size(0);
    for (std::int64_t i = 0; i < places.size(0); ++i) {
      require_range("expanded_src_to_dst_row", i, places.as<std::int32_t>()[i], -1, drops() ? count_ - 1 : kMaxSlots);
    }
  }

  std::int64_t tokens() const { return tokens_; }
  std::int64_t topk() const { return topk_; }
  std::int64_t width() const { return width_; }
  std::int64_t row(std::int64_t n, std::int64_t k) const {
    const std::int64_t place = inputs_.drop_pad_mode < 2 ? k * tokens_ + n : n * topk_ + k;
    const std::int64_t row = inputs_.expanded_src_to_dst_row.as<std::int32_t>()[place];
    return row < count_ ? row : -1;
  }
  float scale(std::int64_t n, std::int64_t k) const {
    return inputs_.scales.absent() ? 1.0F : number(inputs_.scales, n * topk_ + k);
  }
  std::int64_t expert(std::int64_t n, std::int64_t k) const {
    return inputs_.expert_for_source_row.as<std::int32_t>()[n * topk_ + k];
  }

 private:
  bool drops() const { return inputs_.drop_pad_mode % 2 == 1; }

  void check_scales(std::int64_t slots) {
    tokens_ = slots;
    if (inputs_.scales.absent()) return;
    require_axes("scales", inputs_.scales, 2);
    require_numbers("scales", inputs_.scales);
    tokens_ = inputs_.scales.size(0);
    topk_ = inputs_.scales.size(1);
    if (tokens_ * topk_ == slots) return;
    refuse("scales is " + shown(inputs_.scales) + ", should have the " + std::to_string(slots) +
           " elements of expanded_src_to_dst_row");
  }

  void check_added() const {
    const DType dtype = inputs_.expanded_permuted_rows.dtype();
    if (!inputs_.skip1.absent()) require("skip1", inputs_.skip1, dtype, {tokens_, width_});
    if (!inputs_.skip2.absent()) {
      if (inputs_.skip1.absent()) refuse("skip2 is given without skip1");
      require("skip2", inputs_.skip2, dtype, {tokens_, width_});
    }
    if (inputs_.bias.absent()) return;
    require_axes("bias", inputs_.bias, 2);
    require("bias", inputs_.bias, dtype, {inputs_.bias.size(0), width_});
    if (inputs_.expert_for_source_row.absent()) refuse("bias is given without expert_for_source_row");
    require("expert_for_source_row", inputs_.expert_for_source_row, DType::int32, {tokens_, topk_});
    for (std::int64_t i = 0; i < tokens_ * topk_; ++i) {
      require_range("expert_for_source_row", i / topk_, i % topk_, inputs_.expert_for_source_row.as<std::int32_t>()[i],
                    0, inputs_.bias.size(0) - 1);
    }
  }

  const FinalizeRoutingInputs& inputs_;
  std::int64_t tokens_ = 0, topk_ = 1, width_ = 0;
  std::int64_t count_ = 0;  // rows
};

template <class T>
void finalize(const FinalizeRoutingInputs& inputs, const FinalSlots& slots, std::int64_t n, T* out) {
  const std::int64_t width = slots.width();
  std::vector<float> sum(at(width));
  for (const ConstTensor* skip : {&inputs.skip1, &inputs.skip2}) {
    if (skip->absent()) continue;
    const T* const from = skip->as<T>() + n * width;
    for (std::int64_t h = 0; h < width; ++h) sum[at(h)] += static_cast<float>(from[h]);
  }
  for (std::int64_t k = 0; k < slots.topk(); ++k) {
    if (slots.row(n, k) < 0) continue;
    const T* const from = static_cast<const T*>(inputs.expanded_permuted_rows.data()) + slots.row(n, k) * width;
    const T* const bias = inputs.bias.absent() ? nullptr : inputs.bias.as<T>() + slots.expert(n, k) * width;
    const float scale = slots.scale(n, k);
    for (std::int64_t h = 0; h < width; ++h) {
      const auto value = static_cast<float>(from[h]);
      sum[at(h)] += scale * (bias == nullptr ? value : value + static_cast<float>(bias[h]));
    }
  }
  for (std::int64_t h = 0; h < width; ++h) out[h] = T(sum[at(h)]);
}

}  // namespace

Array moe_finalize_routing(const Context& context, const FinalizeRoutingInputs& inputs) {
  const FinalSlots slots(inputs);
  const DType dtype = inputs.expanded_permuted_rows.dtype();
  Array out(dtype, {slots.tokens(), slots.width()});
  const auto run = [&](auto* to) {
    for_ranges(context.pool(), slots.tokens(), kGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t n = begin; n < end; ++n) finalize(inputs, slots, n, to + n * slots.width());
    });
  };
  if (dtype == DType::f32) {
    run(out.as<float>());
  } else if (dtype == DType::bf16) {
    run(out.as<bf16>());
  } else {
    run(out.as<f16>());
  }
  return out;
}

}  // namespace expar::ascend
