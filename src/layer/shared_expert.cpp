// The shared experts' products and their gate, forwards and backwards.
#include "src/layer/shared_expert.h"

#include <cmath>

#include "src/expert/pass.h"
#include "src/layer/convert.h"
#include "src/util/processor.h"

namespace expar {
namespace {

/// The rows as one group.
struct All {
  explicit All(std::int64_t tokens) : offsets{0, tokens} {}
  Groups groups() const { return {1, offsets}; }
  std::int64_t offsets[2];
};

/// dx[t] += dz[t] w
void add_outer(const ConstTensor& dz, const ConstTensor& w, const Tensor& dx, Pool& pool) {
  const std::int64_t hidden = dx.size(1);
  for_ranges(pool, dx.size(0), 1 + kConvertGrain / hidden, [&](std::int64_t begin, std::int64_t end) {
    const FloatMode mode;
    for (std::int64_t t = begin; t < end; ++t) {
      float* const row = dx.as<float>() + t * hidden;
      for (std::int64_t h = 0; h < hidden; ++h) row[h] += dz.as<float>()[t] * w.as<float>()[h];
    }
  });
}

}  // namespace

// In double but for the product, so that it is right to the last bit but one.
void open_gate(const Context& context, const ConstTensor& w, const ConstTensor& x, const Tensor& gate) {
  const std::int64_t tokens = gate.size(0);
  const All all(tokens);
  const ExpertShape shape{.hidden = w.size(0), .inner = 1};
  Pass(context, shape, all.groups())
      .nt(Pass::in_order(x), {w.data(), DType::f32, false}, nullptr, Tensor(gate.data(), DType::f32, {tokens, 1}));
  const FloatMode mode;
  for (std::int64_t t = 0; t < tokens; ++t) {
    gate.as<float>()[t] = static_cast<float>(1 / (1 + std::exp(-double{gate.as<float>()[t]})));
  }
}

void shared_forward(const Context& context, const ExpertShape& shape, const SharedWeights& weights, ConstTensor x,
                    ConstTensor wide_x, SharedRecord& record) {
  const std::int64_t tokens = x.size(0);
  ExpertsRecord& made = record.experts;
  made.pre = made.pre_memory.view(shape.dtype, {tokens, shape.up_rows()});
  made.h = made.h_memory.view(shape.dtype, {tokens, shape.inner});
  record.y = record.y_memory.view(DType::f32, {tokens, shape.hidden});
  record.gate = weights.gate.absent() ? Tensor() : record.gate_memory.view(DType::f32, {tokens});
  const All all(tokens);
  const Pass pass(context, shape, all.groups());
  pass.nt(Pass::in_order(x), weights.expert.up, nullptr, made.pre);
  pass.activate(made.pre, made.h);
  pass.nt(Pass::in_order(made.h), weights.expert.down, nullptr, record.y);
  if (!weights.gate.absent()) open_gate(context, weights.gate, wide_x, record.gate);
}

Tensor shared_backward(const Context& context, const ExpertShape& shape, const SharedWeights& weights, ConstTensor x,
                       ConstTensor wide_x, std::span<const std::int64_t> shards, ConstTensor dout,
                       const SharedRecord& record, const SharedGradients& gradients, SharedScratch& scratch) {
  const std::int64_t tokens = x.size(0);
  const All all(tokens);
  const Pass pass(context, shape, all.groups());
  const Pass by_shard(context, shape, {static_cast<int>(shards.size()) - 1, shards.data()});
  const bool gated = !weights.gate.absent();
  ConstTensor dy = dout;
  if (gated) {
    const Tensor weighted = scratch.dy.view(shape.dtype, dout.shape());
    pass.weigh(Pass::in_order(dout), record.gate.as<float>(), weighted);
    dy = weighted;
  }
  const Tensor dh = scratch.dh.view(shape.dtype, {tokens, shape.inner});
  const Tensor dpre = scratch.dpre.view(shape.dtype, {tokens, shape.up_rows()});
  const Tensor dx = scratch.dx.view(DType::f32, dout.shape());
  by_shard.tn(dy, Pass::in_order(record.experts.h), gradients.down, nullptr);
  pass.nn(dy, weights.expert.down, dh);
  pass.activate_grad(record.experts.pre, dh, dpre);
  by_shard.tn(dpre, Pass::in_order(x), gradients.up, nullptr);
  pass.nn(dpre, weights.expert.up, dx);
  if (!gated) return dx;

  ConstTensor wide_dout = dout;
  if (dout.dtype() != DType::f32) {
    const Tensor converted = scratch.wide_dout.view(DType::f32, dout.shape());
    to_f32(dout, converted, context.pool());
    wide_dout = converted;
  }
  const Tensor dz = scratch.dgate.view(DType::f32, {tokens, 1});
  pass.dot(Pass::in_order(wide_dout), record.y, dz);
  {
    const FloatMode mode;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const double gate = double{record.gate.as<float>()[t]};
      dz.as<float>()[t] = static_cast<float>(double{dz.as<float>()[t]} * gate * (1 - gate));
    }
  }
  by_shard.tn(dz, Pass::in_order(wide_x), gradients.gate, nullptr);
  add_outer(dz, weights.gate, dx, context.pool());
  return dx;
}

}  // namespace expar
