// The experts' networks on rows that have arrived, beside the limits of memory and arithmetic.
#include <cmath>
#include <cstring>

#include "bench/oracle.h"
#include "bench/peak.h"
#include "bench/workload.h"

namespace expar::bench {
namespace {

/// Rows whose every element is computed again.
constexpr std::int64_t kChecked = 4;

/// Weights of the local experts: table rows, scaled so that results stay near one; and the packed copies.
class Weights {
 public:
  Weights(const Context& context, const ExpertShape& shape, std::int64_t experts)
      : up_(shape.dtype, Shape{experts, shape.up_rows(), shape.hidden}),
        down_(shape.dtype, Shape{experts, shape.hidden, shape.inner}) {
    fill(context, up_, 1);
    fill(context, down_, 2);
    weights_.up = pack(context, up_, packed_up_);
    weights_.down = pack(context, down_, packed_down_);
    if (!shape.bias) return;
    up_bias_ = bias(Shape{experts, shape.up_rows()});
    down_bias_ = bias(Shape{experts, shape.hidden});
    weights_.up_bias = up_bias_;
    weights_.down_bias = down_bias_;
  }

  const ExpertWeights& get() const { return weights_; }
  PlainExpert plain(const ExpertShape& shape, std::int64_t e) const {
    const auto matrix = [e](const Tensor& all) {
      return ConstTensor(all.rows(e, 1).data(), all.dtype(), Shape{all.size(1), all.size(2)});
    };
    PlainExpert expert{.up = matrix(up_), .down = matrix(down_)};
    if (!shape.bias) return expert;
    expert.up_bias = up_bias_.as<float>() + e * shape.up_rows();
    expert.down_bias = down_bias_.as<float>() + e * shape.hidden;
    return expert;
  }

 private:
  static void fill(const Context& context, const Tensor& w, std::uint64_t table) {
    const std::int64_t width = w.size(2);
    const auto scale = static_cast<float>(2.0 / std::sqrt(static_cast<double>(width)));
    context.pool().run(w.size(0) * w.size(1), [&](std::int64_t row, int) {
      const std::uint64_t key = (table << 50) + static_cast<std::uint64_t>(row);
      std::byte* to = w.bytes() + static_cast<std::size_t>(row * width) * size_of(w.dtype());
      fill_row(key, w.dtype(), width, to);
      if (w.dtype() == DType::f32) {
        for (std::int64_t i = 0; i < width; ++i) reinterpret_cast<float*>(to)[i] *= scale;
      } else {
        auto* values = reinterpret_cast<bf16*>(to);
        for (std::int64_t i = 0; i < width; ++i) values[i] = bf16(static_cast<float>(values[i]) * scale);
      }
    });
  }

  static Array bias(Shape shape) {
    Array values(DType::f32, shape);
    fill_row(std::uint64_t{3} << 50, DType::f32, shape.elements(), values.view().data());
    return values;
  }

  static GroupWeights pack(const Context& context, const Tensor& w, Array& packed) {
    const Kernels& kernels = context.kernels();
    packed = Array(DType::int8, Shape{w.size(0) * kernels.packed_bytes(w.dtype(), w.size(1), w.size(2))});
    kernels.pack(w.dtype(), static_cast<int>(w.size(0)), w.size(1), w.size(2), w.data(), packed.view().data(),
                 context.pool());
    return {packed.view().data(), w.dtype(), true};
  }

  Array up_, down_, packed_up_, packed_down_, up_bias_, down_bias_;
  ExpertWeights weights_;
};

Work work_of(const Context& context, const ExpertShape& shape, const Plan& plan) {
  std::int64_t active = 0;
  for (const std::int64_t rows : plan.rows()) active += rows > 0;
  const std::int64_t weights = shape.up_rows() * shape.hidden + shape.hidden * shape.inner;
  const std::int64_t bytes = active * weights * static_cast<std::int64_t>(size_of(shape.dtype));
  return {.bytes = static_cast<double>(max_over_ranks(context, bytes)),
          .flops = static_cast<double>(max_over_ranks(context, 2 * plan.received() * weights))};
}

std::int64_t count_wrong_rows(const ExpertShape& shape, const Weights& weights, const Inbox& inbox, const Outbox& y) {
  const Plan& plan = inbox.plan();
  const Rows rows = inbox.expert_rows();
  const std::size_t row_bytes = static_cast<std::size_t>(shape.hidden) * size_of(shape.dtype);
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < kChecked && plan.received() > 0; ++i) {
    const std::int64_t row = plan.received() * (2 * i + 1) / (2 * kChecked);
    std::int64_t e = 0;
    while (plan.offsets()[static_cast<std::size_t>(e + 1)] <= row) ++e;
    const RowRef& ref = inbox.refs()[static_cast<std::size_t>(row)];
    const auto* x = static_cast<const std::byte*>(rows.base[ref.base]) + static_cast<std::size_t>(ref.row) * row_bytes;
    const Expected expected =
        feed_forward(shape, weights.plain(shape, e), read_row(ConstTensor(x, shape.dtype, Shape{1, shape.hidden}), 0));
    wrong += count_wrong(read_row(y.rows(), row), expected, shape.dtype);
  }
  return wrong;
}

}  // namespace

std::vector<Row> measure_experts(const Parallel& ranks, const Options& options) {
  const Context& context = ranks.all;
  const Workload workload(ranks, options);
  const Plan plan = make_plan(context, workload.ids(), {.experts = options.experts});
  const Inbox inbox = dispatch(context, workload.x(), workload.weights(), plan);
  const ExpertShape shape{.hidden = options.hidden,
                          .inner = options.inner,
                          .activation = options.activation,
                          .numbers = options.numbers,
                          .bias = options.bias,
                          .dtype = options.dtype};
  const Weights weights(context, shape, plan.local().count);
  Outbox y = make_outbox(context, plan, options.hidden, options.dtype);
  ExpertsRecord record;
  const auto run = [&] {
    const Phase phase(context.trace(), "experts");
    experts_forward(context, shape, weights.get(), inbox, y, record);
  };
  run();
  std::int64_t wrong = count_wrong_rows(shape, weights, inbox, y);

  const Work work = work_of(context, shape, plan);
  PeakProbes probes(context, work, options.dtype);
  std::vector<Step> steps{{nullptr, run}};
  probes.append(steps);
  const Times times = measure_rounds(context, options.seconds, steps);
  wrong += count_wrong_rows(shape, weights, inbox, y);

  Row row;
  row.what = "experts";
  row.p50_us = median(times[0]);
  row.p99_us = percentile(times[0], 0.99);
  row.bytes = static_cast<std::int64_t>(work.bytes);
  row.gbps = work.bytes / row.p50_us * 1e-3;
  row.of_peak = probes.of_peak(times, 0, 1);
  row.wrong = sum_over_ranks(context, wrong);
  return {row};
}

}  // namespace expar::bench
