// The experts' networks on the rows that dispatch brought: which GEMM reads what, forward and backward.
#include <expar/experts.h>

#include <cmath>
#include <string>
#include <utility>

#include <expar/error.h>

#include "src/expert/pass.h"
#include "src/util/check.h"
#include "src/util/processor.h"

namespace expar {
namespace {

void check(const ExpertShape& shape, const ExpertWeights& weights, std::int64_t experts) {
  const auto matrix = [&](const char* what, const GroupWeights& w) {
    if (w.dtype != shape.dtype) {
      refuse(std::string(what) + " is " + std::string(name(w.dtype)) + ", the experts are " +
             std::string(name(shape.dtype)));
    }
    if (w.data == nullptr && experts > 0) refuse(std::string(what) + " is absent");
  };
  matrix("up", weights.up);
  matrix("down", weights.down);
  if (!shape.bias) return;
  require("up_bias", weights.up_bias, DType::f32, {experts, shape.up_rows()});
  require("down_bias", weights.down_bias, DType::f32, {experts, shape.hidden});
}

void check(const ExpertShape& shape, const Inbox& inbox) {
  const Rows rows = inbox.expert_rows();
  if (rows.width != shape.hidden) {
    refuse("hidden of the inbox is " + std::to_string(rows.width) + ", of the experts " + std::to_string(shape.hidden));
  }
  if (rows.dtype != shape.dtype) {
    refuse("dtype of the inbox is " + std::string(name(rows.dtype)) + ", of the experts " +
           std::string(name(shape.dtype)));
  }
  const Plan& plan = inbox.plan();
  for (std::size_t e = 0; e < plan.rows().size(); ++e) {
    const std::int64_t room = plan.offsets()[e + 1] - plan.offsets()[e];
    if (plan.rows()[e] == room) continue;
    refuse("the experts take plans of alignment 1: local expert " + std::to_string(e) + " has " +
           std::to_string(plan.rows()[e]) + " rows in room for " + std::to_string(room));
  }
}

void check(const ExpertShape& shape, const ExpertGradients& gradients, std::int64_t experts) {
  require("gradient of up", gradients.up, DType::f32, {experts, shape.up_rows(), shape.hidden});
  require("gradient of down", gradients.down, DType::f32, {experts, shape.hidden, shape.inner});
  if (!shape.bias) return;
  require("gradient of up_bias", gradients.up_bias, DType::f32, {experts, shape.up_rows()});
  require("gradient of down_bias", gradients.down_bias, DType::f32, {experts, shape.hidden});
}

const float* data_of(bool present, const ConstTensor& bias) { return present ? bias.as<float>() : nullptr; }
float* data_of(bool present, const Tensor& bias) { return present ? bias.as<float>() : nullptr; }

Groups groups_of(const Plan& plan) { return {static_cast<int>(plan.local().count), plan.offsets().data()}; }

/// dots[i] += dout[i] . bias of row i's expert: in double, where products of two f32 are exact, and in index order.
void add_dots_with_bias(const Context& context, const Plan& plan, const ConstTensor& dout, const ConstTensor& bias,
                        const Tensor& dots) {
  const std::int64_t hidden = bias.size(1);
  const auto element = [&](std::int64_t at) {
    return dout.dtype() == DType::f32 ? double{dout.as<float>()[at]} : double{static_cast<float>(dout.as<bf16>()[at])};
  };
  context.pool().run(plan.local().count, [&](std::int64_t e, int) {
    const FloatMode mode;
    const float* const b = bias.as<float>() + e * hidden;
    for (std::int64_t i = plan.offsets()[at(e)]; i < plan.offsets()[at(e + 1)]; ++i) {
      double sum = 0;
      for (std::int64_t n = 0; n < hidden; ++n) sum += element(i * hidden + n) * double{b[n]};
      dots.as<float>()[i] += static_cast<float>(sum);
    }
  });
}

}  // namespace

void validate(const ExpertShape& shape) {
  if (shape.hidden < 1) refuse("hidden is " + std::to_string(shape.hidden) + ", must be at least 1");
  if (shape.inner < 1) refuse("inner is " + std::to_string(shape.inner) + ", must be at least 1");
  if (shape.dtype != DType::f32 && shape.dtype != DType::bf16) {
    refuse("experts compute in f32 or bf16, not " + std::string(name(shape.dtype)));
  }
  const auto [alpha, limit, offset] = shape.numbers;
  if (!std::isfinite(alpha)) refuse("alpha is " + std::to_string(alpha) + ", must be a number");
  if (!(limit > 0)) refuse("limit is " + std::to_string(limit) + ", must be above 0");
  if (!std::isfinite(offset)) refuse("offset is " + std::to_string(offset) + ", must be a number");
}

void experts_forward(const Context& context, const ExpertShape& shape, const ExpertWeights& weights, const Inbox& inbox,
                     Outbox& y, ExpertsRecord& record) {
  validate(shape);
  check(shape, inbox);
  const Plan& plan = inbox.plan();
  check(shape, weights, plan.local().count);
  if (y.layout() == Layout::rank_major) refuse("the experts write results expert by expert; y is rank_major");
  const std::int64_t rows = plan.received();
  require("y", y.rows(), shape.dtype, {rows, shape.hidden});
  const float* const up_bias = data_of(shape.bias, weights.up_bias);
  const float* const down_bias = data_of(shape.bias, weights.down_bias);

  record.pre = record.pre_memory.view(shape.dtype, {rows, shape.up_rows()});
  record.h = record.h_memory.view(shape.dtype, {rows, shape.inner});
  const Pass pass(context, shape, groups_of(plan));
  const float* const by_row = inbox.weights().data();
  Rows x = inbox.expert_rows();
  if (shape.weights_on == WeightsOn::input) {
    const Tensor weighted = record.weighted.view(shape.dtype, {rows, shape.hidden});
    pass.weigh(x, by_row, weighted);
    x = Pass::in_order(weighted);
  }
  pass.nt(x, weights.up, up_bias, record.pre);
  pass.activate(record.pre, record.h);
  if (shape.weights_on != WeightsOn::inner) return pass.nt(Pass::in_order(record.h), weights.down, down_bias, y.rows());
  const Tensor weighted = record.weighted.view(shape.dtype, {rows, shape.inner});
  pass.weigh(Pass::in_order(record.h), by_row, weighted);
  pass.nt(Pass::in_order(weighted), weights.down, down_bias, y.rows(), by_row);
}

void experts_backward(const Context& context, const ExpertShape& shape, const ExpertWeights& weights,
                      const Inbox& inbox, const Inbox& dout, const Outbox& y, const ExpertsRecord& record,
                      const ExpertGradients& gradients, Outbox* dx, Outbox& dweights, ExpertsScratch& scratch) {
  validate(shape);
  check(shape, inbox);
  check(shape, dout);
  const Plan& plan = inbox.plan();
  check(shape, weights, plan.local().count);
  check(shape, gradients, plan.local().count);
  if (weights.up.packed || weights.down.packed) refuse("the backward pass takes weights that are not packed");
  if (dout.plan().id() != plan.id()) refuse("dout was dispatched with another plan than the inbox");
  const std::int64_t rows = plan.received();
  require("pre of the record", record.pre, shape.dtype, {rows, shape.up_rows()});
  require("h of the record", record.h, shape.dtype, {rows, shape.inner});
  if (dx != nullptr) require("dx", dx->rows(), shape.dtype, {rows, shape.hidden});
  require("dweights", dweights.rows(), DType::f32, {rows, 1});

  const Tensor dy = scratch.dy.view(shape.dtype, {rows, shape.hidden});
  const Tensor dh = scratch.dh.view(shape.dtype, {rows, shape.inner});
  const Tensor dpre = scratch.dpre.view(shape.dtype, {rows, shape.up_rows()});
  const Rows dout_rows = dout.expert_rows();
  const float* const by_row = inbox.weights().data();  // they came with the forward dispatch
  float* const up_bias = data_of(shape.bias, gradients.up_bias);
  float* const down_bias = data_of(shape.bias, gradients.down_bias);
  const Rows h = Pass::in_order(record.h);

  const Pass pass(context, shape, groups_of(plan));
  switch (shape.weights_on) {
    case WeightsOn::output:
      require("y", y.rows(), shape.dtype, {rows, shape.hidden});
      pass.weigh_and_dot(dout_rows, by_row, y.rows(), dy, dweights.rows());
      pass.tn(dy, h, gradients.down, down_bias);
      pass.nn(dy, weights.down, dh);
      break;
    case WeightsOn::inner: {
      // y / w may be a division by zero, so the weight's gradient is taken where h meets it.
      const Tensor weighted = scratch.weighted_dy.view(shape.dtype, {rows, shape.hidden});
      pass.weigh(dout_rows, by_row, weighted);
      pass.tn(weighted, h, gradients.down, down_bias);
      pass.copy(dout_rows, dy);
      const Tensor dweighted = scratch.dx.view(shape.dtype, {rows, shape.inner});
      pass.nn(dy, weights.down, dweighted);
      pass.weigh_and_dot(Pass::in_order(dweighted), by_row, record.h, dh, dweights.rows());
      if (shape.bias) add_dots_with_bias(context, plan, dy, weights.down_bias, dweights.rows());
      break;
    }
    case WeightsOn::input:
      pass.copy(dout_rows, dy);
      pass.tn(dy, h, gradients.down, down_bias);
      pass.nn(dy, weights.down, dh);
      break;
  }
  pass.activate_grad(record.pre, dh, dpre);
  if (shape.weights_on != WeightsOn::input) {
    pass.tn(dpre, inbox.expert_rows(), gradients.up, up_bias);
    if (dx != nullptr) pass.nn(dpre, weights.up, dx->rows());
    return;
  }
  const Tensor x = scratch.x.view(shape.dtype, {rows, shape.hidden});
  const Tensor dweighted = scratch.dx.view(shape.dtype, {rows, shape.hidden});
  pass.weigh(inbox.expert_rows(), by_row, x);
  pass.tn(dpre, Pass::in_order(x), gradients.up, up_bias);
  pass.nn(dpre, weights.up, dweighted);
  pass.dot(inbox.expert_rows(), dweighted, dweights.rows());
  if (dx != nullptr) pass.weigh(Pass::in_order(dweighted), by_row, dx->rows());
}

}  // namespace expar
