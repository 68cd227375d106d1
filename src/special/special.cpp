// Zero, copy and constant experts, forwards and backwards.
#include <expar/special.h>

#include <cmath>
#include <cstring>
#include <memory_resource>
#include <string>
#include <utility>
#include <vector>

#include <expar/error.h>

#include "src/util/check.h"
#include "src/util/ranges.h"

namespace expar {
namespace {

constexpr std::int64_t kTokenGrain = 16;    // tokens per task: some ten microseconds
constexpr std::int64_t kColumnGrain = 128;  // columns of a gradient per task

void check(const SpecialPass& pass) {
  const auto& [zero, copy, constant] = pass.experts;
  for (const auto& [what, count] :
       {std::pair("zero", zero), std::pair("copy", copy), std::pair("constant", constant)}) {
    if (count < 0) refuse(std::to_string(count) + " " + what + " experts are below 0");
  }
  if (pass.x.shape().rank() != 2) refuse("x has shape " + pass.x.shape().str() + ", not [T, H]");
  const std::int64_t tokens = pass.x.size(0), hidden = pass.x.size(1);
  require("x", pass.x, DType::f32, {tokens, hidden});
  const std::int64_t topk = pass.ids.shape().rank() == 2 ? pass.ids.size(1) : 0;
  require("ids", pass.ids, DType::int32, {tokens, topk});
  require("weights", pass.weights, DType::f32, {tokens, topk});
  require_experts("ids", pass.ids, pass.first + pass.experts.count());
  if (constant == 0) return;
  require("mix", pass.mix, DType::f32, {constant, 2, hidden});
  require("value", pass.value, DType::f32, {constant, hidden});
}

/// The slots of a token that go to special experts, as those who compute see them.
class SpecialSlots {
 public:
  explicit SpecialSlots(const SpecialPass& pass)
      : pass_(pass), topk_(pass.ids.size(1)), hidden_(pass.x.size(1)), first_copy_(pass.first + pass.experts.zero) {}

  std::int64_t hidden() const { return hidden_; }
  std::int64_t topk() const { return topk_; }
  const float* x(std::int64_t t) const { return pass_.x.as<float>() + t * hidden_; }
  double weight(std::int64_t slot) const { return double{pass_.weights.as<float>()[slot]}; }
  bool is_special(std::int64_t slot) const { return id(slot) >= pass_.first; }
  bool is_copy(std::int64_t slot) const { return id(slot) >= first_copy_ && constant(slot) < 0; }
  /// Which constant expert; below 0: none.
  std::int64_t constant(std::int64_t slot) const { return id(slot) - first_copy_ - pass_.experts.copy; }
  const float* mix(std::int64_t constant, int part) const {
    return pass_.mix.as<float>() + (2 * constant + part) * hidden_;
  }
  const float* value(std::int64_t constant) const { return pass_.value.as<float>() + constant * hidden_; }

 private:
  std::int32_t id(std::int64_t slot) const { return pass_.ids.as<std::int32_t>()[slot]; }

  const SpecialPass& pass_;
  std::int64_t topk_, hidden_, first_copy_;
};

/// In double, where products of two f32 are exact, and in index order.
double dot(const float* a, const float* b, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

/// How much of x and of v a constant expert gives.
struct Mix {
  Mix(const SpecialSlots& slots, std::int64_t constant, const float* x) {
    const double difference =
        dot(slots.mix(constant, 0), x, slots.hidden()) - dot(slots.mix(constant, 1), x, slots.hidden());
    of_x = 1 / (1 + std::exp(-difference));
    of_value = 1 / (1 + std::exp(difference));
  }
  double of_x = 0, of_value = 0;
};

/// What the parameters' gradients take of a slot: of_value * dout, and of_mix * x, once added and once subtracted.
struct Share {
  float of_value = 0, of_mix = 0;
};

/// One slot's part of dx and of the weights' gradient.
Share go_back(const SpecialSlots& slots, std::int64_t t, std::int64_t slot, const float* dout, float* dx,
              float* dweight) {
  const std::int64_t hidden = slots.hidden();
  const double weight = slots.weight(slot);
  const float* const x = slots.x(t);
  const std::int64_t constant = slots.constant(slot);
  if (constant < 0) {
    *dweight = slots.is_copy(slot) ? static_cast<float>(dot(dout, x, hidden)) : 0.0F;
    for (std::int64_t h = 0; slots.is_copy(slot) && h < hidden; ++h) {
      dx[h] += static_cast<float>(weight * double{dout[h]});
    }
    return {};
  }
  const Mix mix(slots, constant, x);
  const double by_x = dot(dout, x, hidden), by_value = dot(dout, slots.value(constant), hidden);
  *dweight = static_cast<float>(mix.of_x * by_x + mix.of_value * by_value);
  const double by_mix = weight * mix.of_x * mix.of_value * (by_x - by_value);
  const float* const m1 = slots.mix(constant, 0);
  const float* const m2 = slots.mix(constant, 1);
  for (std::int64_t h = 0; h < hidden; ++h) {
    dx[h] += static_cast<float>(weight * mix.of_x * double{dout[h]} + by_mix * (double{m1[h]} - double{m2[h]}));
  }
  return {static_cast<float>(weight * mix.of_value), static_cast<float>(by_mix)};
}

/// Columns [begin, end) of the gradients of one shard's parameters, summed token by token.
void add_shares(const SpecialSlots& slots, const std::pmr::vector<Share>& shares, const float* dout,
                std::int64_t first_token, std::int64_t last_token, std::int64_t begin, std::int64_t end, float* mix,
                float* value) {
  const std::int64_t hidden = slots.hidden();
  for (std::int64_t slot = first_token * slots.topk(); slot < last_token * slots.topk(); ++slot) {
    const std::int64_t constant = slots.constant(slot), t = slot / slots.topk();
    if (constant < 0) continue;
    const Share& share = shares[static_cast<std::size_t>(slot)];
    float* const m1 = mix + 2 * constant * hidden;
    float* const m2 = m1 + hidden;
    for (std::int64_t h = begin; h < end; ++h) {
      value[constant * hidden + h] += share.of_value * dout[t * hidden + h];
      m1[h] += share.of_mix * slots.x(t)[h];
      m2[h] -= share.of_mix * slots.x(t)[h];
    }
  }
}

void zero(const Tensor& tensor) {
  if (tensor.byte_size() > 0) std::memset(tensor.data(), 0, tensor.byte_size());
}

}  // namespace

void add_special(const Context& context, const SpecialPass& pass, Tensor out) {
  check(pass);
  require("out", out, DType::f32, pass.x.shape());
  const SpecialSlots slots(pass);
  const std::int64_t hidden = slots.hidden();
  for_ranges(context.pool(), pass.x.size(0), kTokenGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t slot = begin * slots.topk(); slot < end * slots.topk(); ++slot) {
      const std::int64_t t = slot / slots.topk(), constant = slots.constant(slot);
      const float* const x = slots.x(t);
      float* const to = out.as<float>() + t * hidden;
      const double weight = slots.weight(slot);
      if (constant >= 0) {
        const Mix mix(slots, constant, x);
        const float* const v = slots.value(constant);
        for (std::int64_t h = 0; h < hidden; ++h) {
          to[h] += static_cast<float>(weight * (mix.of_x * double{x[h]} + mix.of_value * double{v[h]}));
        }
      } else if (slots.is_copy(slot)) {
        for (std::int64_t h = 0; h < hidden; ++h) to[h] += static_cast<float>(weight * double{x[h]});
      }
    }
  });
}

void special_backward(const Context& context, const SpecialPass& pass, std::span<const std::int64_t> shards,
                      ConstTensor dout, Tensor dx, Tensor dweights, const SpecialGradients& gradients) {
  check(pass);
  require_ascending("shards", shards, pass.x.size(0));
  const auto count = static_cast<std::int64_t>(shards.size()) - 1;
  require("dout", dout, DType::f32, pass.x.shape());
  require("dx", dx, DType::f32, pass.x.shape());
  require("dweights", dweights, DType::f32, pass.ids.shape());
  const std::int64_t hidden = pass.x.size(1), constant = pass.experts.constant;
  if (constant > 0) {
    require("gradient of mix", gradients.mix, DType::f32, {count, constant, 2, hidden});
    require("gradient of value", gradients.value, DType::f32, {count, constant, hidden});
  }
  const SpecialSlots slots(pass);
  std::pmr::vector<Share> shares(static_cast<std::size_t>(pass.ids.elements()), context.memory().get());
  for_ranges(context.pool(), pass.x.size(0), kTokenGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t slot = begin * slots.topk(); slot < end * slots.topk(); ++slot) {
      if (!slots.is_special(slot)) continue;
      const std::int64_t t = slot / slots.topk();
      shares[static_cast<std::size_t>(slot)] = go_back(slots, t, slot, dout.as<float>() + t * hidden,
                                                       dx.as<float>() + t * hidden, dweights.as<float>() + slot);
    }
  });
  if (constant == 0) return;
  zero(gradients.mix);
  zero(gradients.value);
  for_ranges(context.pool(), hidden, kColumnGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t s = 0; s < count; ++s) {
      add_shares(slots, shares, dout.as<float>(), shards[static_cast<std::size_t>(s)],
                 shards[static_cast<std::size_t>(s) + 1], begin, end,
                 gradients.mix.as<float>() + s * 2 * constant * hidden,
                 gradients.value.as<float>() + s * constant * hidden);
    }
  });
}

}  // namespace expar
