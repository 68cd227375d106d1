// AdamW: checks the parameters, owns the moments, leaves the arithmetic to the backend.
#include <expar/optimizer.h>

#include <cmath>
#include <utility>

#include <expar/error.h>

#include "src/util/check.h"
#include "src/util/processor.h"

namespace expar {
namespace {

void check(const Parameter& p) {
  const auto same = [&](const ConstTensor& t, DType dtype, const char* what) {
    if (t.dtype() != dtype || t.elements() != p.value.elements()) {
      refuse(p.name + ": " + what + " is " + std::string(name(t.dtype())) + " " + t.shape().str() + ", should be " +
             std::string(name(dtype)) + " " + p.value.shape().str());
    }
  };
  same(p.value, DType::f32, "value");
  same(p.gradient, DType::f32, "gradient");
  if (!p.low.absent()) same(p.low, DType::bf16, "low");
}

}  // namespace

/// Makes the moments at the first call; afterwards the parameters must be those of that call.
void AdamW::keep_moments(std::span<const Parameter> parameters) {
  for (const Parameter& p : parameters) check(p);
  if (moments_.empty()) {
    std::vector<Moments> moments;
    for (const Parameter& p : parameters) {
      moments.push_back({Array(DType::f32, {p.value.elements()}), Array(DType::f32, {p.value.elements()})});
    }
    moments_ = std::move(moments);
  }
  if (parameters.size() != moments_.size()) {
    refuse("the step before had " + std::to_string(moments_.size()) + " parameters, this one has " +
           std::to_string(parameters.size()));
  }
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    if (parameters[i].value.elements() == moments_[i].m.view().elements()) continue;
    refuse(parameters[i].name + " has " + std::to_string(parameters[i].value.elements()) +
           " elements, in its place were " + std::to_string(moments_[i].m.view().elements()) + " in the step before");
  }
}

std::vector<AdamWMoments> AdamW::moments(std::span<const Parameter> parameters) {
  keep_moments(parameters);
  std::vector<AdamWMoments> all;
  for (const Moments& moments : moments_) all.push_back({moments.m, moments.v});
  return all;
}

void AdamW::step(const Context& context, std::span<const Parameter> parameters, float lr) {
  if (!std::isfinite(lr) || lr < 0) refuse("the learning rate is " + std::to_string(lr));
  keep_moments(parameters);

  const FloatMode mode;
  ++step_;
  const auto correction = [&](float beta) {
    return static_cast<float>(1.0 - std::pow(static_cast<double>(beta), static_cast<double>(step_)));
  };
  AdamWStep step;
  step.lr = lr;
  step.beta1 = options_.beta1;
  step.beta2 = options_.beta2;
  step.eps = options_.eps;
  step.c1 = correction(options_.beta1);
  step.c2 = correction(options_.beta2);
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const Parameter& p = parameters[i];
    step.count = p.value.elements();
    if (step.count == 0) continue;
    step.decay = p.decay ? options_.decay : 0.0F;
    step.g = p.gradient.as<float>();
    step.p = p.value.as<float>();
    step.m = moments_[i].m.as<float>();
    step.v = moments_[i].v.as<float>();
    step.low = p.low.absent() ? nullptr : p.low.as<bf16>();
    context.kernels().adamw(step, context.pool());
  }
}

}  // namespace expar
