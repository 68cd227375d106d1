// Tokens and their experts to the rows that the experts' kernels take.
#include <expar/ascend/init_routing.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "src/ascend/order.h"
#include "src/ascend/quantise.h"
#include "src/util/copy.h"
#include "src/util/ranges.h"

namespace expar::ascend {
namespace {

constexpr std::int64_t kGrain = 16;  // rows per task
constexpr std::int64_t kNowhere = std::numeric_limits<std::int64_t>::max();

void check_slots(const ConstTensor& x, const ConstTensor& expert_idx) {
  require_axes("x", x, 2);
  require_axes("expert_idx", expert_idx, 2);
  require("expert_idx", expert_idx, DType::int32, {x.size(0), expert_idx.size(1)});
  require_range("the elements of expert_idx", expert_idx.elements(), 0, kMaxSlots);
}

/// A row of expanded_x: where it comes from, whose it is, where it goes.
struct Row {
  std::int64_t token, expert, place;
};

/// What moe_init_routing_v2 does, step by step.
class Routed {
 public:
  Routed(const ConstTensor& x, const ConstTensor& expert_idx, const InitRoutingOptions& options)
      : x_(x), expert_idx_(expert_idx), options_(options) {
    check_slots(x, expert_idx);
    check_options();
    check_quantisation();
    sort();
  }

  InitRoutingV2 run(const Context& context) const {
    InitRoutingV2 out;
    out.expanded_row_idx = Array(DType::int32, {slots()});
    const std::vector<Row> rows = place(out.expanded_row_idx.as<std::int32_t>());
    if (options_.expert_tokens_num_flag) out.expert_token_cumsum_or_count = count();
    out.expanded_x = pads() ? Array(quantisation_.dtype, {options_.expert_num, options_.expert_capacity, width()})
                            : Array(quantisation_.dtype, {places(), width()});
    if (moves_scale() || quantisation_.mode == QuantMode::per_token) {
      out.expanded_scale = Array(DType::f32, {places()});
    } else if (quantisation_.mode == QuantMode::mx) {
      out.expanded_scale = Array(DType::fp8_e8m0, {places(), scales_of_row(quantisation_, width())});
    }
    for_ranges(context.pool(), static_cast<std::int64_t>(rows.size()), kGrain,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) write(rows[at(i)], out);
               });
    return out;
  }

 private:
  std::int64_t slots() const { return expert_idx_.elements(); }
  std::int64_t topk() const { return expert_idx_.size(1); }
  std::int64_t width() const { return x_.size(1); }
  std::int64_t experts() const { return end_ - first_; }
  bool pads() const { return options_.drop_pad_mode == 1; }
  bool moves_scale() const { return options_.quant_mode == -1 && !options_.scale.absent(); }
  /// Rows that expanded_x has room for.
  std::int64_t places() const {
    if (pads()) return options_.expert_num * options_.expert_capacity;
    return options_.active_num > 0 ? std::min(options_.active_num, slots()) : slots();
  }

  void check_options() {
    require_range("expert_num", options_.expert_num, 1, kMaxSlots);
    require_range("drop_pad_mode", options_.drop_pad_mode, 0, 1);
    require_range("expert_tokens_num_type", options_.expert_tokens_num_type, 0, 2);
    require_range("row_idx_type", options_.row_idx_type, 0, 1);
    require_range("active_num", options_.active_num, -1, std::numeric_limits<std::int64_t>::max());
    first_ = 0;
    end_ = options_.expert_num;
    if (options_.active_expert_range) {
      first_ = (*options_.active_expert_range)[0];
      end_ = (*options_.active_expert_range)[1];
      require_range("active_expert_range[0]", first_, 0, options_.expert_num - 1);
      require_range("active_expert_range[1]", end_, first_ + 1, options_.expert_num);
    }
    if (!pads()) return;
    require_range("expert_capacity", options_.expert_capacity, 1, std::max<std::int64_t>(x_.size(0), 1));
    require_range("E C of expanded_x", options_.expert_num * options_.expert_capacity, 0, kMaxSlots);
    if (experts() != options_.expert_num) refuse("active_expert_range is not all experts, as drop_pad_mode 1 needs");
    if (options_.row_idx_type == 1) refuse("row_idx_type is 1, should be 0 with drop_pad_mode 1");
  }

  void check_quantisation() {
    const std::int64_t mode = options_.quant_mode;
    require_range("quant_mode", mode, -1, 3);
    quantisation_ = {.mode = QuantMode::none, .dtype = x_.dtype()};
    const ConstTensor &scale = options_.scale, &offset = options_.offset;
    if (mode >= 0) require_numbers("x", x_);
    if (mode != 0 && !offset.absent()) refuse("offset is given without quant_mode 0");
    if (mode == -1 && !scale.absent()) require("scale", scale, DType::f32, {x_.size(0)});
    if (mode == 0) {
      require("scale", scale, DType::f32, {1});
      require("offset", offset, DType::f32, {1});
      quantisation_ = {QuantMode::static_scale, DType::int8, {offset.as<float>(), 1}};
    }
    if (mode == 1) {
      quantisation_ = {QuantMode::per_token, DType::int8};
      if (scale.absent()) return;
      require_axes("scale", scale, 2);
      require("scale", scale, DType::f32, {scale.size(0) == 1 ? 1 : experts(), width()});
    }
    if (mode >= 2) {
      if (!scale.absent()) refuse("scale is given with quant_mode " + std::to_string(mode) + ", which takes none");
      quantisation_ = {QuantMode::mx, mode == 2 ? DType::fp8_e5m2 : DType::fp8_e4m3};
    }
  }

  void sort() {
    keys_ = integers(expert_idx_);
    for (std::int64_t& key : keys_) {
      if (key < first_ || key >= end_) key = kNowhere;
    }
    order_ = sorted_order(keys_);
    active_ = slots() - std::count(keys_.begin(), keys_.end(), kNowhere);
  }

  Row row_of(std::int64_t i, std::int64_t place) const {
    const std::int64_t slot = order_[at(i)];
    return {slot / topk(), keys_[at(slot)], place};
  }

  /// Fills expanded_row_idx; returns the rows that have a place.
  std::vector<Row> place(std::int32_t* row_idx) const {
    std::vector<Row> rows;
    if (options_.row_idx_type == 1) {
      std::copy(order_.begin(), order_.end(), row_idx);
    } else {
      std::fill_n(row_idx, slots(), -1);
    }
    std::int64_t in_expert = 0;
    for (std::int64_t i = 0; i < active_; ++i) {
      in_expert = i > 0 && row_of(i, 0).expert == row_of(i - 1, 0).expert ? in_expert + 1 : 0;
      const std::int64_t place = pads() ? row_of(i, 0).expert * options_.expert_capacity + in_expert : i;
      const bool has_room = pads() ? in_expert < options_.expert_capacity : i < places();
      if (has_room) rows.push_back(row_of(i, place));
      // Without padding the place of a row beyond active_num is told all the same.
      if (options_.row_idx_type == 0 && (has_room || !pads()))
        row_idx[order_[at(i)]] = static_cast<std::int32_t>(place);
    }
    return rows;
  }

  Array count() const {
    std::vector<std::int64_t> counts(at(experts()));
    for (std::int64_t i = 0; i < active_; ++i) ++counts[at(row_of(i, 0).expert - first_)];
    const bool is_pairs = options_.expert_tokens_num_type == 2;
    Array out = is_pairs ? Array(DType::int64, {options_.expert_num, 2}) : Array(DType::int64, {experts()});
    std::int64_t* to = out.as<std::int64_t>();
    std::int64_t sum = 0;
    for (std::int64_t e = 0; e < experts(); ++e) {
      const std::int64_t count = counts[at(e)];
      sum += count;
      if (!is_pairs) {
        *to++ = options_.expert_tokens_num_type == 0 ? sum : count;
      } else if (count > 0) {
        *to++ = first_ + e;
        *to++ = count;
      }
    }
    return out;
  }

  std::span<const float> smooth_of(const Row& row) const {
    if (options_.quant_mode < 0 || options_.scale.absent()) return {};
    const std::int64_t width = options_.scale.elements() == 1 ? 1 : this->width();
    if (width == 0) return {};
    const std::int64_t rows = options_.scale.elements() / width;
    return {options_.scale.as<float>() + (rows == 1 ? 0 : (row.expert - first_) * width), at(width)};
  }

  void write(const Row& row, const InitRoutingV2& out) const {
    const Tensor x = out.expanded_x, scale = out.expanded_scale;
    std::byte* const scales = scale.absent() ? nullptr : scale.bytes() + row.place * scale_row_bytes(scale.dtype());
    const ConstTensor from(x_.bytes() + row.token * width() * static_cast<std::int64_t>(size_of(x_.dtype())),
                           x_.dtype(), {width()});
    quantise_row(quantisation_, from, smooth_of(row), x.bytes() + row.place * value_bytes(quantisation_, width()),
                 scales);
    if (moves_scale()) scale.as<float>()[row.place] = options_.scale.as<float>()[row.token];
  }

  std::int64_t scale_row_bytes(DType dtype) const {
    return dtype == DType::f32 ? static_cast<std::int64_t>(sizeof(float)) : scale_bytes(quantisation_, width());
  }

  ConstTensor x_, expert_idx_;
  const InitRoutingOptions& options_;
  Quantisation quantisation_;
  std::int64_t first_ = 0, end_ = 0, active_ = 0;
  std::vector<std::int64_t> keys_;   // the expert of each slot, or nowhere
  std::vector<std::int32_t> order_;  // slots, sorted
};

}  // namespace

InitRouting moe_init_routing(ConstTensor x, ConstTensor row_idx, ConstTensor expert_idx, std::int64_t active_num) {
  check_slots(x, expert_idx);
  require("row_idx", row_idx, DType::int32, expert_idx.shape());
  require_range("active_num", active_num, 0, std::numeric_limits<std::int64_t>::max());
  const std::int64_t tokens = x.size(0), topk = expert_idx.size(1), slots = tokens * topk;
  for (std::int64_t i = 0; i < slots; ++i) {
    const std::int64_t wanted = i % topk * tokens + i / topk;
    if (row_idx.as<std::int32_t>()[i] == wanted) continue;
    refuse("row_idx[" + std::to_string(i / topk) + "," + std::to_string(i % topk) + "] is " +
           std::to_string(row_idx.as<std::int32_t>()[i]) + ", should be " + std::to_string(wanted));
  }
  const std::vector<std::int64_t> keys = integers(expert_idx);
  const std::vector<std::int32_t> order = sorted_order(keys);
  InitRouting out{Array(x.dtype(), {std::min(tokens, active_num) * topk, x.size(1)}), Array(DType::int32, {slots}),
                  Array(DType::int32, {slots})};
  std::vector<std::int32_t> from(at(out.expanded_x.view().size(0)));
  for (std::int64_t i = 0; i < slots; ++i) {
    const std::int32_t slot = order[at(i)];
    out.expanded_row_idx.as<std::int32_t>()[row_idx.as<std::int32_t>()[slot]] = static_cast<std::int32_t>(i);
    out.expanded_expert_idx.as<std::int32_t>()[i] = static_cast<std::int32_t>(keys[at(slot)]);
    if (i < static_cast<std::int64_t>(from.size())) from[at(i)] = static_cast<std::int32_t>(slot / topk);
  }
  copy_rows(out.expanded_x.view().bytes(), x.bytes(), from, at(x.size(1)) * size_of(x.dtype()), Store::cached);
  return out;
}

InitRoutingV2 moe_init_routing_v2(const Context& context, ConstTensor x, ConstTensor expert_idx,
                                  const InitRoutingOptions& options) {
  return Routed(x, expert_idx, options).run(context);
}

}  // namespace expar::ascend
