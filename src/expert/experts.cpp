// The experts' networks on the rows that dispatch brought: which GEMM reads what, forward and backward.
#include <expar/experts.h>

#include <cmath>
#include <string>
#include <utility>

#include <expar/error.h>

namespace expar {
namespace {

[[noreturn]] void refuse(std::string message) { throw Error(ErrorCode::bad_argument, std::move(message)); }

void require(const std::string& what, const ConstTensor& tensor, DType dtype, const Shape& shape) {
  if (tensor.dtype() == dtype && tensor.shape() == shape) return;
  refuse(what + " is " + std::string(name(tensor.dtype())) + " " + tensor.shape().str() + ", should be " +
         std::string(name(dtype)) + " " + shape.str());
}

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
  const Rows rows = inbox.gathered();
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

/// The kernels on the R rows of one plan: [R, up_rows] is wide, [R, F] is h, [R, H] is x, y and their gradients.
class Pass {
 public:
  Pass(const Context& context, const ExpertShape& shape, const Plan& plan)
      : kernels_(context.kernels()),
        pool_(context.pool()),
        shape_(shape),
        groups_{static_cast<int>(plan.local().count), plan.offsets().data()},
        rows_(plan.received()) {}

  /// Row i of `tensor` is row i of the group's rows.
  Rows in_order(const ConstTensor& tensor) const {
    return {.base = {tensor.data(), nullptr}, .dtype = shape_.dtype, .width = tensor.size(1)};
  }

  /// out = in w^T + bias
  void nt(const Rows& in, const GroupWeights& w, const float* bias, const Tensor& out) const {
    if (rows_ == 0) return;
    GemmNT call;
    call.groups = groups_;
    call.n = out.size(1);
    call.k = in.width;
    call.rows = in;
    call.w = w;
    call.bias = bias;
    call.y = out.data();
    call.y_dtype = shape_.dtype;
    kernels_.gemm_nt(call, pool_);
  }

  /// din = dout w
  void nn(const ConstTensor& dout, const GroupWeights& w, const Tensor& din) const {
    if (rows_ == 0) return;
    GemmNN call;
    call.groups = groups_;
    call.n = dout.size(1);
    call.k = din.size(1);
    call.dy = dout.data();
    call.w = w;
    call.dx = din.data();
    call.dx_dtype = shape_.dtype;
    kernels_.gemm_nn(call, pool_);
  }

  /// dw = dout^T in, dbias = the sum of dout; experts without rows get zeros.
  void tn(const ConstTensor& dout, const Rows& in, const Tensor& dw, float* dbias, bool accumulate) const {
    GemmTN call;
    call.groups = groups_;
    call.n = dout.size(1);
    call.k = in.width;
    call.dy = dout.data();
    call.rows = in;
    call.dw = dw.as<float>();
    call.dbias = dbias;
    call.accumulate = accumulate;
    kernels_.gemm_tn(call, pool_);
  }

  void activate(const ConstTensor& pre, const Tensor& h) const {
    if (rows_ == 0) return;
    Activate call;
    call.act = shape_.activation;
    call.numbers = shape_.numbers;
    call.rows = rows_;
    call.inner = shape_.inner;
    call.dtype = shape_.dtype;
    call.pre = pre.data();
    call.h = h.data();
    kernels_.activate(call, pool_);
  }

  void activate_grad(const ConstTensor& pre, const ConstTensor& dh, const Tensor& dpre) const {
    if (rows_ == 0) return;
    ActivateGrad call;
    call.act = shape_.activation;
    call.numbers = shape_.numbers;
    call.rows = rows_;
    call.inner = shape_.inner;
    call.dtype = shape_.dtype;
    call.pre = pre.data();
    call.dh = dh.data();
    call.dpre = dpre.data();
    kernels_.activate_grad(call, pool_);
  }

  /// out = rows, each times its weight; dot = rows . other, unweighted.
  void weigh(const Rows& rows, const ConstTensor& other, const Tensor& out, const Tensor& dot) const {
    if (rows_ == 0) return;
    Gather call;
    call.rows = rows;
    call.count = rows_;
    call.scaled = true;
    call.out = out.data();
    call.other = other.data();
    call.dot = dot.as<float>();
    kernels_.gather(call, pool_);
  }

 private:
  const Kernels& kernels_;
  Pool& pool_;
  const ExpertShape& shape_;
  Groups groups_;
  std::int64_t rows_;
};

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
  const std::int64_t rows = plan.received();
  require("y", y.rows(), shape.dtype, {rows, shape.hidden});
  if (y.layout() == Layout::rank_major) refuse("the experts write results expert by expert; y is rank_major");

  record.pre = record.pre_memory.view(shape.dtype, {rows, shape.up_rows()});
  record.h = record.h_memory.view(shape.dtype, {rows, shape.inner});
  const Pass pass(context, shape, plan);
  pass.nt(inbox.gathered(), weights.up, data_of(shape.bias, weights.up_bias), record.pre);
  pass.activate(record.pre, record.h);
  pass.nt(pass.in_order(record.h), weights.down, data_of(shape.bias, weights.down_bias), y.rows());
}

void experts_backward(const Context& context, const ExpertShape& shape, const ExpertWeights& weights,
                      const Inbox& inbox, const Inbox& dout, const Outbox& y, const ExpertsRecord& record,
                      const ExpertGradients& gradients, Outbox& dx, Outbox& dweights, ExpertsScratch& scratch) {
  validate(shape);
  check(shape, inbox);
  check(shape, dout);
  const Plan& plan = inbox.plan();
  check(shape, weights, plan.local().count);
  check(shape, gradients, plan.local().count);
  if (weights.up.packed || weights.down.packed) refuse("the backward pass takes weights that are not packed");
  if (dout.plan().id() != plan.id()) refuse("dout was dispatched with another plan than the inbox");
  const std::int64_t rows = plan.received();
  require("y", y.rows(), shape.dtype, {rows, shape.hidden});
  require("pre of the record", record.pre, shape.dtype, {rows, shape.up_rows()});
  require("h of the record", record.h, shape.dtype, {rows, shape.inner});
  require("dx", dx.rows(), shape.dtype, {rows, shape.hidden});
  require("dweights", dweights.rows(), DType::f32, {rows, 1});

  const Tensor dy = scratch.dy.view(shape.dtype, {rows, shape.hidden});
  const Tensor dh = scratch.dh.view(shape.dtype, {rows, shape.inner});
  const Tensor dpre = scratch.dpre.view(shape.dtype, {rows, shape.up_rows()});
  Rows dout_rows = dout.gathered();
  dout_rows.refs = inbox.refs().data();  // the weights came with the forward dispatch
  float* const up_bias = data_of(shape.bias, gradients.up_bias);
  float* const down_bias = data_of(shape.bias, gradients.down_bias);

  const Pass pass(context, shape, plan);
  pass.weigh(dout_rows, y.rows(), dy, dweights.rows());
  pass.tn(dy, pass.in_order(record.h), gradients.down, down_bias, gradients.accumulate);
  pass.nn(dy, weights.down, dh);
  pass.activate_grad(record.pre, dh, dpre);
  pass.tn(dpre, inbox.gathered(), gradients.up, up_bias, gradients.accumulate);
  pass.nn(dpre, weights.up, dx.rows());
}

}  // namespace expar
