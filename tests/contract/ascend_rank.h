// One rank's way through the four operators, with memory of the right shapes.
#pragma once

#include <algorithm>
#include <functional>

#include <expar/ascend.h>

#include "tests/contract/ascend_oracle.h"
#include "tests/contract/share.h"

namespace expar::test {

/// An element of a tensor of any dtype that rows travel in.
inline float element(const ConstTensor& tensor, std::int64_t i) {
  switch (tensor.dtype()) {
    case DType::bf16:
      return static_cast<float>(tensor.as<bf16>()[i]);
    case DType::f16:
      return static_cast<float>(tensor.as<f16>()[i]);
    case DType::int8:
      return tensor.as<std::int8_t>()[i];
    case DType::fp8_e4m3:
      return static_cast<float>(tensor.as<fp8_e4m3>()[i]);
    case DType::fp8_e5m2:
      return static_cast<float>(tensor.as<fp8_e5m2>()[i]);
    case DType::fp8_e8m0:
      return static_cast<float>(tensor.as<fp8_e8m0>()[i]);
    default:
      return tensor.as<float>()[i];
  }
}

inline void set_element(const Tensor& tensor, std::int64_t i, float value) {
  if (tensor.dtype() == DType::bf16) {
    tensor.as<bf16>()[i] = bf16(value);
  } else if (tensor.dtype() == DType::f16) {
    tensor.as<f16>()[i] = f16(value);
  } else {
    tensor.as<float>()[i] = value;
  }
}

struct Modes {
  DType dtype = DType::bf16;
  std::int64_t quant_mode = 0;
  std::optional<DType> y_dtype = {};
  std::int64_t nums_type = 1;
  std::int64_t comm_quant_mode = 0;
};

/// A rank's tensors; `rows` of expand_x are at least as many as can come.
struct AscendRank {
  AscendRank(const Context& c, const Batch& batch, const Modes& m)
      : context(c), modes(m), domain(batch.domain(c.rank())) {
    const auto rank = static_cast<std::size_t>(c.rank());
    bs = batch.tokens[rank];
    const std::int64_t k = batch.topk, h = batch.h;
    const DType values =
        m.quant_mode == 0 ? m.dtype : m.y_dtype.value_or(m.quant_mode < 3 ? DType::int8 : DType::fp8_e4m3);
    x = Array(m.dtype, {bs, h});
    for (std::int64_t t = 0; t < bs; ++t) {
      const std::vector<float> row = batch.x(c.rank(), t);
      for (std::int64_t i = 0; i < h; ++i) set_element(x, t * h + i, row[static_cast<std::size_t>(i)]);
    }
    ids = batch.ids(c.rank());
    mask = Array(DType::int8, {bs});
    for (std::int64_t t = 0; t < batch.active[rank]; ++t) mask.as<std::int8_t>()[t] = 1;
    weights = Array(DType::f32, {bs, k});
    for (std::int64_t i = 0; i < bs * k; ++i) weights.as<float>()[i] = batch.weight(c.rank(), i / k, i % k);
    y = Array(values, {bs * (k + domain.shared_expert_num), ascend::message_bytes(h, m.dtype, m.quant_mode, m.y_dtype) /
                                                                static_cast<std::int64_t>(size_of(values))});
    expand_idx = Array(DType::int32, {bs * k});
    const std::int64_t a = ascend::expand_rows(domain, c.rank(), bs, k);
    expand_x = Array(values, {a, h});
    if (m.quant_mode == 2) scales_out = Array(DType::f32, {a});
    if (m.quant_mode == 3) scales_out = Array(DType::f32, {a, (h + 127) / 128});
    if (m.quant_mode == 4) scales_out = Array(DType::fp8_e8m0, {a, ((h + 31) / 32 + 1) / 2 * 2});
    info = Array(DType::int32, {a * 128});
    nums = Array(DType::int64, {domain.local_expert_num(c.rank())});
    results = Array(m.dtype, {a, h});
    quant_expand_x = Array(DType::int8, {a, ascend::quant_expand_bytes(h)});
    out = Array(m.dtype, {bs, h});
  }

  ConstTensor id_tensor() const { return ConstTensor(ids.data(), Shape{bs, weights.view().size(1)}); }
  ascend::CommCmdInfo dispatch_setup(ConstTensor scales = {}) const {
    return ascend::moe_distribute_dispatch_setup(context, domain,
                                                 {.x = x,
                                                  .expert_ids = id_tensor(),
                                                  .scales = scales,
                                                  .x_active_mask = mask,
                                                  .quant_mode = modes.quant_mode,
                                                  .y_dtype = modes.y_dtype},
                                                 y, expand_idx);
  }
  void dispatch_teardown(ascend::CommCmdInfo info_) const {
    ascend::moe_distribute_dispatch_teardown(context, domain,
                                             {.x = x,
                                              .y = y,
                                              .expert_ids = id_tensor(),
                                              .quant_mode = modes.quant_mode,
                                              .y_dtype = modes.y_dtype,
                                              .expert_token_nums_type = modes.nums_type},
                                             std::move(info_),
                                             {.expand_x = expand_x,
                                              .dynamic_scales = scales_out,
                                              .assist_info_for_combine = info,
                                              .expert_token_nums = nums});
  }
  ascend::CommCmdInfo combine_setup() const {
    return ascend::moe_distribute_combine_setup(context, domain,
                                                {.expand_x = results,
                                                 .expert_ids = id_tensor(),
                                                 .assist_info_for_combine = info,
                                                 .comm_quant_mode = modes.comm_quant_mode},
                                                quant_expand_x);
  }
  void combine_teardown(ascend::CommCmdInfo info_, ConstTensor shared_expert_x = {}) const {
    ascend::moe_distribute_combine_teardown(context, domain,
                                            {.expand_x = results,
                                             .quant_expand_x = quant_expand_x,
                                             .expert_ids = id_tensor(),
                                             .expand_idx = expand_idx,
                                             .expert_scales = weights,
                                             .x_active_mask = mask,
                                             .shared_expert_x = shared_expert_x,
                                             .comm_quant_mode = modes.comm_quant_mode},
                                            std::move(info_), out);
  }

  Context context;
  Modes modes;
  ascend::Domain domain;
  std::int64_t bs;
  std::vector<std::int32_t> ids;
  Array x, mask, weights, y, expand_idx, expand_x, scales_out, info, nums, results, quant_expand_x, out;
};

/// What dispatch gave `rank` is where the pages say: order, prefix sums, numbers; rows by check_row(copy, i).
inline void check_dispatched(const AscendRank& rank, const Batch& batch,
                             const std::function<void(const Copy&, std::int64_t)>& check_row) {
  const auto* const prefix = rank.info.as<std::int32_t>();
  std::int64_t row = 0, local = 0;
  for (const auto& of_expert : copies_for(batch, rank.context.rank())) {
    const std::int64_t first = row;
    for (const Copy& copy : of_expert) check_row(copy, row++);
    for (int source = 0; source < batch.ranks; ++source) {
      const auto upto =
          std::count_if(of_expert.begin(), of_expert.end(), [&](const Copy& c) { return c.source <= source; });
      require(prefix[local * batch.ranks + source] == first + upto, batch.str() + ": a prefix sum");
    }
    const std::int64_t wanted = rank.modes.nums_type == 0 ? row : row - first;
    require(rank.nums.as<std::int64_t>()[local] == wanted, batch.str() + ": expert_token_nums");
    ++local;
  }
}

}  // namespace expar::test
