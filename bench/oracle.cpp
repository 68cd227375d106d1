// The formula of an expert, and how far from it a result may be.
#include "bench/oracle.h"

#include <algorithm>
#include <cmath>

namespace expar::bench {
namespace {

double read(ConstTensor tensor, std::int64_t index) {
  return tensor.dtype() == DType::f32 ? static_cast<double>(tensor.as<float>()[index])
                                      : static_cast<double>(static_cast<float>(tensor.as<bf16>()[index]));
}

double activated(const ExpertShape& shape, const std::vector<double>& pre, std::int64_t f) {
  const double alpha = double{shape.numbers.alpha}, limit = double{shape.numbers.limit};
  double x = pre[static_cast<std::size_t>(f)], factor = 1;
  if (gated(shape.activation)) {
    x = std::min(x, limit);
    factor = std::clamp(pre[static_cast<std::size_t>(f + shape.inner)], -limit, limit) + double{shape.numbers.offset};
  }
  switch (shape.activation) {
    case Activation::swiglu:
    case Activation::silu:
      return x / (1 + std::exp(-alpha * x)) * factor;
    case Activation::gelu:
    case Activation::geglu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))) * factor;
    case Activation::relu2:
      break;
  }
  return std::max(x, 0.0) * std::max(x, 0.0);
}

/// w x + bias, with the squares of the terms where wanted.
std::vector<double> multiply(ConstTensor w, const std::vector<double>& x, const float* bias,
                             std::vector<double>* square) {
  const std::int64_t width = w.size(1);
  std::vector<double> y(static_cast<std::size_t>(w.size(0)));
  for (std::int64_t n = 0; n < w.size(0); ++n) {
    double sum = bias == nullptr ? 0 : static_cast<double>(bias[n]);
    double squares = sum * sum;
    for (std::int64_t k = 0; k < width; ++k) {
      const double term = read(w, n * width + k) * x[static_cast<std::size_t>(k)];
      sum += term;
      squares += term * term;
    }
    y[static_cast<std::size_t>(n)] = sum;
    if (square != nullptr) square->push_back(squares);
  }
  return y;
}

}  // namespace

Expected feed_forward(const ExpertShape& shape, const PlainExpert& expert, const std::vector<double>& x) {
  const std::vector<double> pre = multiply(expert.up, x, expert.up_bias, nullptr);
  std::vector<double> h;
  for (std::int64_t f = 0; f < shape.inner; ++f) h.push_back(activated(shape, pre, f));
  Expected expected;
  expected.value = multiply(expert.down, h, expert.down_bias, &expected.square);
  return expected;
}

std::vector<double> read_row(ConstTensor tensor, std::int64_t row) {
  std::vector<double> values;
  for (std::int64_t i = 0; i < tensor.size(1); ++i) values.push_back(read(tensor, row * tensor.size(1) + i));
  return values;
}

std::int64_t count_wrong(const std::vector<double>& got, const Expected& expected, DType dtype) {
  // bf16 rounds pre, h and y, each by at most 2^-9 of itself, and the errors add up like the terms: at random. Ten
  // times that. f32 does so a thousand times over its longer chains.
  const double tolerance = dtype == DType::bf16 ? 0x1p-5 : 1e-4;
  std::int64_t wrong = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double room = tolerance * (std::sqrt(expected.square[i]) + std::abs(expected.value[i])) + 1e-30;
    wrong += !(std::abs(got[i] - expected.value[i]) <= room);
  }
  return wrong;
}

}  // namespace expar::bench
