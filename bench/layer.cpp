// The whole layer, forward for inference and as a step of training, beside the limits of memory and arithmetic.
#include <algorithm>
#include <cstring>

#include "bench/layer.h"
#include "bench/oracle.h"
#include "bench/peak.h"
#include "bench/workload.h"

namespace expar::bench {
namespace {

constexpr float kLearningRate = 1e-4F;
const char* const kPrefix = "bench";

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

/// One layer with its tokens, everything that its measurements share.
class Bench {
 public:
  Bench(const Parallel& ranks, const Options& options)
      : ranks_(ranks),
        context_(ranks.experts),
        options_(options),
        tokens_(options.tokens * ranks.slice_count()),
        layer_(context_, layer_options(ranks, options)),
        shape_{.hidden = options.hidden,
               .inner = layer_.local_inner().count,
               .activation = options.activation,
               .numbers = options.numbers,
               .bias = options.bias,
               .dtype = options.dtype},
        x_(options.dtype, Shape{tokens_, options.hidden}),
        dout_(options.dtype, x_.view().shape()),
        out_(options.dtype, x_.view().shape()),
        dx_(options.dtype, x_.view().shape()) {
    layer_.initialise(1, kPrefix);
    const std::vector<std::int64_t> tokens = tokens_by_rank(ranks, options.tokens)[at(context_.rank())];
    for (std::int64_t t = 0; t < tokens_; ++t) {
      const auto row = static_cast<std::uint64_t>(tokens[at(t)]);
      const std::size_t to = at(t * options.hidden) * size_of(options.dtype);
      fill_row(row, options.dtype, options.hidden, x_.view().bytes() + to);
      fill_row(row + (std::uint64_t{1} << 41), options.dtype, options.hidden, dout_.view().bytes() + to);
    }
  }

  Row forward() {
    const auto run = [&] { layer_.forward(context_, x_, out_); };
    train_forward();
    const Array wanted = copy_of(out_);
    run();
    std::int64_t wrong = count_different(wanted);
    const Row row = measure("layer_forward", forward_work(), run);
    wrong += count_different(wanted) + count_wrong_token();
    return with_wrong(row, wrong);
  }

  Row step() {
    std::vector<Parameter> parameters = layer_.expert_parameters(kPrefix);
    parameters.push_back(layer_.dense_parameters(kPrefix).front());
    AdamW optimizer;
    train_forward();
    std::int64_t wrong = count_wrong_token();
    const Row row = measure("layer_step", step_work(parameters), [&] {
      train_forward();
      layer_.backward(context_, record_, dout_, dx_);
      const ConstTensor shards = layer_.dense_shard_gradients().front();
      const Tensor total = parameters.back().gradient;
      all_reduce(ranks_.data, ConstTensor(shards.data(), DType::f32, Shape{shards.size(0), total.elements()}),
                 Tensor(total.data(), DType::f32, Shape{total.elements()}));
      for (std::size_t p = 0; p + 1 < parameters.size(); ++p) sum_over(ranks_.replicas, parameters[p].gradient);
      const Phase phase(context_.trace(), "optimizer");
      optimizer.step(context_, parameters, kLearningRate);
    });
    train_forward();  // with what the last step has made of the parameters
    wrong += count_wrong_token();
    return with_wrong(row, wrong);
  }

 private:
  static Array copy_of(const Tensor& tensor) {
    Array copy(tensor.dtype(), tensor.shape());
    std::memcpy(copy.view().data(), tensor.data(), tensor.byte_size());
    return copy;
  }

  /// In place; nothing where there is no such group.
  void sum_over(const Communicator& group, const Tensor& values) {
    if (!group) return;
    const Tensor total = sum_.view(DType::f32, Shape{values.elements()});
    all_reduce(context_.on(group), ConstTensor(values.data(), DType::f32, Shape{1, values.elements()}), total);
    std::memcpy(values.data(), total.data(), total.byte_size());
  }

  void train_forward() {
    const std::int64_t shards[2] = {0, tokens_};
    layer_.forward(context_, x_, out_, {}, shards, record_);
  }

  Row measure(const char* what, const Work& work, const std::function<void()>& run) {
    PeakProbes probes(ranks_.all, work, options_.dtype);
    std::vector<Step> steps{{nullptr, run}};
    probes.append(steps);
    const Times times = measure_rounds(ranks_.all, options_.seconds, steps);
    Row row;
    row.what = what;
    row.p50_us = median(times[0]);
    row.p99_us = percentile(times[0], 0.99);
    row.bytes = static_cast<std::int64_t>(work.bytes);
    row.gbps = work.bytes / row.p50_us * 1e-3;
    row.of_peak = probes.of_peak(times, 0, 1);
    return row;
  }

  Row with_wrong(Row row, std::int64_t wrong) const {
    row.wrong = sum_over_ranks(ranks_.all, wrong);
    return row;
  }

  /// Weights of the experts that have rows, once.
  Work forward_work() const {
    std::int64_t active = 0;
    for (const std::int64_t rows : record_.plan.rows()) active += rows > 0;
    const std::int64_t weights = shape_.up_rows() * shape_.hidden + shape_.hidden * shape_.inner;
    const std::int64_t bytes = active * weights * static_cast<std::int64_t>(size_of(shape_.dtype));
    return {.bytes = static_cast<double>(max_over_ranks(ranks_.all, bytes)),
            .flops = static_cast<double>(max_over_ranks(ranks_.all, 2 * record_.plan.received() * weights))};
  }

  /// Weights once forward and once backward; then AdamW reads p, g, m, v and writes p, m, v and the copies.
  Work step_work(const std::vector<Parameter>& parameters) const {
    Work work = forward_work();
    std::int64_t bytes = 0;
    for (const Parameter& p : parameters) {
      bytes += 7 * static_cast<std::int64_t>(p.value.byte_size() / sizeof(float) * sizeof(float));
      if (!p.low.absent()) bytes += static_cast<std::int64_t>(p.low.byte_size());
    }
    work.bytes = 2 * work.bytes + static_cast<double>(max_over_ranks(ranks_.all, bytes));
    work.flops *= 3;
    return work;
  }

  std::int64_t count_different(const Tensor& wanted) const {
    return count_wrong(out_.view().data(), wanted.data(), options_.dtype, wanted.elements());
  }

  /// Wrong elements of one token of this rank. Its experts live anywhere, so every rank computes for every rank's
  /// token what its own experts, or slices of them, give. Collective.
  std::int64_t count_wrong_token() {
    const std::int64_t token = tokens_ / 2;
    const std::int64_t ranks = context_.size();
    const std::int64_t hidden = options_.hidden;
    const std::int64_t topk = options_.topk;
    Array xs(options_.dtype, Shape{ranks, hidden});
    Array ids(DType::int32, Shape{ranks, topk});
    Array weights(DType::f32, Shape{ranks, topk});
    all_gather(context_, x_.view().rows(token, 1), xs);
    all_gather(context_, record_.routing.ids.rows(token, 1), ids);
    all_gather(context_, record_.routing.weights.rows(token, 1), weights);

    const std::vector<Parameter> parameters = layer_.expert_parameters(kPrefix);
    const ExpertRange local = layer_.local_experts();
    Array mine(DType::f32, Shape{1, ranks * hidden * 2});  // values, then squares
    Array all(DType::f32, Shape{ranks * hidden * 2});
    for (std::int64_t i = 0; i < ranks * topk; ++i) {
      const std::int64_t e = ids.as<std::int32_t>()[i] - local.first;
      if (e < 0 || e >= local.count) continue;
      const Expected part = feed_forward(shape_, plain(parameters, e), read_row(xs, i / topk));
      const float weight = weights.as<float>()[i];
      float* to = mine.as<float>() + i / topk * hidden;
      for (std::int64_t c = 0; c < hidden; ++c) {
        to[c] += weight * static_cast<float>(part.value[at(c)]);
        to[ranks * hidden + c] += weight * weight * static_cast<float>(part.square[at(c)]);
      }
    }
    all_reduce(context_, mine, all);
    sum_over(ranks_.tensor, all);
    Expected expected;
    for (std::int64_t c = 0; c < hidden; ++c) {
      expected.value.push_back(all.as<float>()[context_.rank() * hidden + c]);
      expected.square.push_back(all.as<float>()[(ranks + context_.rank()) * hidden + c]);
    }
    return count_wrong(read_row(out_, token), expected, options_.dtype);
  }

  PlainExpert plain(const std::vector<Parameter>& parameters, std::int64_t e) const {
    const auto matrix = [e](const Parameter& p) {
      const ConstTensor all = p.low.absent() ? p.value : p.low;
      return ConstTensor(all.rows(e, 1).data(), all.dtype(), Shape{all.size(1), all.size(2)});
    };
    PlainExpert expert{.up = matrix(parameters[0]), .down = matrix(parameters[1])};
    if (!options_.bias) return expert;
    expert.up_bias = parameters[2].value.as<float>() + e * shape_.up_rows();
    const bool first_slice = parameters.size() > 3;  // which adds the bias of down
    if (first_slice) expert.down_bias = parameters[3].value.as<float>() + e * shape_.hidden;
    return expert;
  }

  Parallel ranks_;
  Context context_;  // along ep
  Options options_;
  std::int64_t tokens_;  // of this rank, and of those with other slices of its experts
  MoeLayer layer_;
  ExpertShape shape_;
  Array x_, dout_, out_, dx_;
  MoeRecord record_;
  Buffer sum_;
};

}  // namespace

MoeLayerOptions layer_options(const Parallel& ranks, const Options& options) {
  MoeLayerOptions layer;
  layer.tensor = ranks.tensor;
  layer.hidden = options.hidden;
  layer.inner = options.inner;
  layer.router.experts = options.experts;
  layer.router.topk = options.topk;
  layer.router.balance = 0.01F;
  layer.activation = options.activation;
  layer.numbers = options.numbers;
  layer.bias = options.bias;
  layer.dtype = options.dtype;
  return layer;
}

std::vector<Row> measure_layer(const Parallel& ranks, const Options& options) {
  if (options.batches > 1) return measure_overlap(ranks, options);
  Bench bench(ranks, options);
  std::vector<Row> rows{bench.forward()};
  if (options.train) rows.push_back(bench.step());
  return rows;
}

}  // namespace expar::bench
