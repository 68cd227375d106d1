// What special experts are to a layer.
#include "src/layer/special_part.h"

#include <cstring>

#include <expar/collectives.h>

#include "src/util/ranges.h"

namespace expar {
namespace {

constexpr std::int64_t kTokenGrain = 16;

}  // namespace

Tensor SpecialPart::routed(const Tensor& ids, Buffer& memory) const {
  if (!*this) return ids;
  const Tensor kept = memory.view(DType::int32, ids.shape());
  for (std::int64_t i = 0; i < ids.elements(); ++i) {
    const std::int32_t id = ids.as<std::int32_t>()[i];
    kept.as<std::int32_t>()[i] = id < first_ ? id : -1;
  }
  return kept;
}

Tensor SpecialPart::restored(const Tensor& routed, const Tensor& ids, Buffer& memory) const {
  if (!*this) return routed;
  const Tensor all = memory.view(DType::int32, ids.shape());
  for (std::int64_t i = 0; i < ids.elements(); ++i) {
    const std::int32_t id = ids.as<std::int32_t>()[i];
    all.as<std::int32_t>()[i] = id < first_ ? routed.as<std::int32_t>()[i] : id;
  }
  return all;
}

std::vector<std::int64_t> SpecialPart::counts(const Context& context, const Routing& routing,
                                              std::span<const std::int64_t> routed) const {
  std::vector<std::int64_t> counts(routed.begin(), routed.end());
  if (!*this) return counts;
  std::vector<std::int64_t> mine(static_cast<std::size_t>(experts_.count()));
  for (std::int64_t i = 0; i < routing.ids.elements(); ++i) {
    const std::int64_t special = routing.ids.as<std::int32_t>()[i] - first_;
    if (special >= 0) ++mine[static_cast<std::size_t>(special)];
  }
  const Array all(DType::int64, {context.size(), experts_.count()});
  all_gather(context, ConstTensor(mine.data(), {1, experts_.count()}), all);
  for (std::int64_t e = 0; e < experts_.count(); ++e) {
    std::int64_t sum = 0;
    for (int rank = 0; rank < context.size(); ++rank) sum += all.as<std::int64_t>()[rank * experts_.count() + e];
    counts.push_back(sum);
  }
  return counts;
}

Tensor SpecialPart::forward(const Context& context, const SpecialPass& pass, ConstTensor shared, ConstTensor gate,
                            Buffer& memory) {
  const Tensor out = memory.view(DType::f32, pass.x.shape());
  const std::int64_t hidden = pass.x.size(1);
  for_ranges(context.pool(), pass.x.size(0), kTokenGrain, [&](std::int64_t begin, std::int64_t end) {
    float* const to = out.as<float>();
    if (shared.absent()) {
      std::memset(to + begin * hidden, 0, static_cast<std::size_t>((end - begin) * hidden) * sizeof(float));
      return;
    }
    for (std::int64_t t = begin; t < end; ++t) {
      const float weight = gate.absent() ? 1.0F : gate.as<float>()[t];
      for (std::int64_t i = t * hidden; i < (t + 1) * hidden; ++i) to[i] = weight * shared.as<float>()[i];
    }
  });
  add_special(context, pass, out);
  return out;
}

void SpecialPart::backward(const Context& context, const SpecialPass& pass, std::span<const std::int64_t> shards,
                           ConstTensor dout, Tensor dx, Tensor dweights) {
  const auto count = static_cast<std::int64_t>(shards.size()) - 1;
  gradients_.mix = mix_.view(DType::f32, {count, experts_.constant, 2, pass.x.size(1)});
  gradients_.value = value_.view(DType::f32, {count, experts_.constant, pass.x.size(1)});
  special_backward(context, pass, shards, dout, dx, dweights, gradients_);
}

}  // namespace expar
