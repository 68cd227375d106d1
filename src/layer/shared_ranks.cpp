// Shared experts on ranks of their own: where they lie, and how tokens find them.
#include "src/layer/shared_ranks.h"

#include <algorithm>
#include <string>

namespace expar {

SharedRanks::SharedRanks(const MoeLayerOptions& options, int rank, int ranks)
    : copies_(options.shared_ranks), rank_(rank), nearest_(std::int64_t{rank} * copies_ / ranks) {
  const auto refuse = [&](const std::string& why) {
    throw Error(ErrorCode::bad_argument, "shared_ranks is " + std::to_string(copies_) + why);
  };
  if (copies_ >= ranks) refuse(", which leaves none of " + std::to_string(ranks) + " ranks for the other experts");
  if (options.shared_inner == 0) refuse(", and shared_inner 0: there are no shared experts");
  if (!options.inference) refuse(": shared experts on ranks of their own are for MoeLayerOptions::inference");
  for (int r = 0; r < copies_; ++r) first_experts_.push_back(r);
  for (int r = 0; r <= ranks - copies_; ++r) {
    first_experts_.push_back(copies_ + experts_of(r, ranks - copies_, options.routed_experts()).first);
  }
}

ExpertRange SharedRanks::routed() const {
  if (hold_here()) return {};
  const auto rank = static_cast<std::size_t>(rank_);
  return {first_experts_[rank] - copies_, first_experts_[rank + 1] - first_experts_[rank]};
}

ConstTensor SharedRanks::ids(ConstTensor routed, ConstTensor mask) {
  const std::int64_t tokens = routed.size(0), topk = routed.size(1);
  const Tensor all = ids_.view(DType::int32, {tokens, topk + 1});
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int32_t* const from = routed.as<std::int32_t>() + t * topk;
    std::int32_t* const to = all.as<std::int32_t>() + t * (topk + 1);
    for (std::int64_t k = 0; k < topk; ++k) to[k] = from[k] < 0 ? from[k] : from[k] + copies_;
    const bool is_padding = !mask.absent() && mask.as<std::int8_t>()[t] == 0;
    to[topk] = is_padding ? -1 : static_cast<std::int32_t>(nearest_);
  }
  return all;
}

ConstTensor SharedRanks::weights(ConstTensor routed, ConstTensor gate, Buffer& memory) const {
  const std::int64_t tokens = routed.size(0), topk = routed.size(1);
  const Tensor all = memory.view(DType::f32, {tokens, topk + 1});
  for (std::int64_t t = 0; t < tokens; ++t) {
    float* const to = all.as<float>() + t * (topk + 1);
    std::copy_n(routed.as<float>() + t * topk, topk, to);
    to[topk] = gate.absent() ? 1.0F : gate.as<float>()[t];
  }
  return all;
}

}  // namespace expar
