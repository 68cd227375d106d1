// The kernels of an expert's two products and its activation, on the rows of consecutive groups.
#pragma once

#include <expar/context.h>
#include <expar/experts.h>

namespace expar {

/// Row i of groups that stand one after another; of tensors [R, ...] the i-th row.
class Pass {
 public:
  Pass(const Context& context, const ExpertShape& shape, const Groups& groups)
      : kernels_(context.kernels()),
        pool_(context.pool()),
        shape_(shape),
        groups_(groups),
        rows_(groups.offsets[groups.count]) {}

  std::int64_t rows() const { return rows_; }

  /// The rows of a tensor as they stand.
  static Rows in_order(const ConstTensor& tensor) {
    return {.base = {tensor.data(), nullptr}, .dtype = tensor.dtype(), .width = tensor.size(1)};
  }

  /// out = in w^T + bias, the bias of each row times its weight where there are any.
  void nt(const Rows& in, const GroupWeights& w, const float* bias, const Tensor& out,
          const float* bias_weights = nullptr) const {
    if (rows_ == 0) return;
    GemmNT call;
    call.groups = groups_;
    call.n = out.size(1);
    call.k = in.width;
    call.rows = in;
    call.w = w;
    call.bias = bias;
    call.bias_weights = bias_weights;
    call.y = out.data();
    call.y_dtype = out.dtype();
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
    call.dx_dtype = din.dtype();
    kernels_.gemm_nn(call, pool_);
  }

  /// dw = dout^T in, dbias = the sum of dout; groups without rows get zeros.
  void tn(const ConstTensor& dout, const Rows& in, const Tensor& dw, float* dbias) const {
    GemmTN call;
    call.groups = groups_;
    call.n = dout.size(1);
    call.k = in.width;
    call.dy = dout.data();
    call.rows = in;
    call.dw = dw.as<float>();
    call.dbias = dbias;
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

  /// out = rows, side by side.
  void copy(const Rows& rows, const Tensor& out) const { gather(rows, nullptr, out.data(), nullptr, nullptr); }
  /// out = rows, each times its weight.
  void weigh(const Rows& rows, const float* weights, const Tensor& out) const {
    gather(rows, weights, out.data(), nullptr, nullptr);
  }
  /// dot[i] = rows[i] . other[i], without weights.
  void dot(const Rows& rows, const ConstTensor& other, const Tensor& dots) const {
    gather(rows, nullptr, nullptr, other.data(), dots.as<float>());
  }
  /// Both at once: the rows are read once.
  void weigh_and_dot(const Rows& rows, const float* weights, const ConstTensor& other, const Tensor& out,
                     const Tensor& dots) const {
    gather(rows, weights, out.data(), other.data(), dots.as<float>());
  }

 private:
  void gather(const Rows& rows, const float* weights, void* out, const void* other, float* dots) const {
    if (rows_ == 0) return;
    Gather call;
    call.rows = rows;
    call.count = rows_;
    call.weights = weights;
    call.out = out;
    call.other = other;
    call.dot = dots;
    kernels_.gather(call, pool_);
  }

  const Kernels& kernels_;
  Pool& pool_;
  const ExpertShape& shape_;
  Groups groups_;
  std::int64_t rows_;
};

}  // namespace expar
