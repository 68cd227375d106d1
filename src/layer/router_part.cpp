// The router's products, forwards and backwards, in f32.
#include "src/layer/router_part.h"

#include <cstring>

#include "src/layer/convert.h"
#include "src/layer/record.h"

namespace expar {

ConstTensor RouterPart::read(const Context& context, ConstTensor x, const std::optional<Jitter>& jitter) {
  const ConstTensor plain = in_f32(x, wide_, context.pool());
  if (!jitter) return plain;
  const Tensor shaken = jittered_.view(DType::f32, x.shape());
  std::memcpy(shaken.data(), plain.data(), plain.byte_size());
  jitter->apply(shaken, context.pool());
  return shaken;
}

ConstTensor RouterPart::score(const Context& context, const LayerParameters& parameters, ConstTensor x,
                              const std::optional<Jitter>& jitter) {
  const std::int64_t tokens = x.size(0);
  const Tensor logits = logits_.view(DType::f32, {tokens, options_.router.experts});
  const std::int64_t all[2] = {0, tokens};
  GemmNT call;
  call.groups = {1, all};
  call.n = options_.router.experts;
  call.k = options_.hidden;
  call.rows = {.base = {read(context, x, jitter).data(), nullptr}, .dtype = DType::f32, .width = options_.hidden};
  call.w = {parameters.router().data(), DType::f32, false};
  if (options_.router.bias) call.bias = parameters.router_bias().as<float>();
  call.y = logits.data();
  if (tokens > 0) context.kernels().gemm_nt(call, context.pool());
  return logits;
}

ConstTensor RouterPart::backward(const Context& context, const LayerParameters& parameters, const MoeRecord& record,
                                 ConstTensor by_slot, const std::optional<Jitter>& jitter) {
  const std::int64_t tokens = record.kept->x.size(0);
  const std::int64_t experts = options_.router.experts;
  const Tensor dz = dlogits_.view(DType::f32, {tokens, experts});
  route_backward(context, options_.router, record.routing, record.losses, by_slot, dz);

  const auto shards = static_cast<int>(record.kept->shards.size()) - 1;
  weight_gradients_ = weight_memory_.view(DType::f32, {shards, experts, options_.hidden});
  GemmTN to_weight;
  to_weight.groups = {shards, record.kept->shards.data()};
  to_weight.n = experts;
  to_weight.k = options_.hidden;
  to_weight.dy = dz.data();
  to_weight.rows = {
      .base = {read(context, record.kept->x, jitter).data(), nullptr}, .dtype = DType::f32, .width = options_.hidden};
  to_weight.dw = weight_gradients_.as<float>();
  if (options_.router.bias) {
    bias_gradients_ = bias_memory_.view(DType::f32, {shards, experts});
    to_weight.dbias = bias_gradients_.as<float>();
  }
  context.kernels().gemm_tn(to_weight, context.pool());

  const Tensor dx = dx_.view(DType::f32, {tokens, options_.hidden});
  const std::int64_t all[2] = {0, tokens};
  GemmNN to_x;
  to_x.groups = {1, all};
  to_x.n = experts;
  to_x.k = options_.hidden;
  to_x.dy = dz.data();
  to_x.w = {parameters.router().data(), DType::f32, false};
  to_x.dx = dx.data();
  if (tokens > 0) context.kernels().gemm_nn(to_x, context.pool());
  if (jitter) jitter->apply(dx, context.pool());
  if (options_.dtype == DType::f32) return dx;
  const Tensor low = low_dx_.view(DType::bf16, {tokens, options_.hidden});
  to_bf16(dx, low, context.pool());
  return low;
}

}  // namespace expar
