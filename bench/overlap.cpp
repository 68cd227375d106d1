// Micro-batches of a layer's inference in flight together, beside the same ones one after the other.
#include <cstring>
#include <thread>

#include "bench/layer.h"
#include "bench/timing.h"
#include "bench/workload.h"

namespace expar::bench {
namespace {

/// Tokens [begin, begin + count) of a rank.
struct Batch {
  Batch(const Context& context, const Options& options, std::int64_t begin, std::int64_t count)
      : x(options.dtype, Shape{count, options.hidden}), out(options.dtype, x.view().shape()) {
    const std::size_t row_bytes = static_cast<std::size_t>(options.hidden) * size_of(options.dtype);
    const std::int64_t first = context.rank() * options.tokens + begin;
    for (std::int64_t t = 0; t < count; ++t) {
      fill_row(static_cast<std::uint64_t>(first + t), options.dtype, options.hidden,
               x.view().bytes() + static_cast<std::size_t>(t) * row_bytes);
    }
  }

  Array x, out;
  MoeRecord record;
};

class Overlap {
 public:
  Overlap(const Parallel& ranks, const Options& options)
      : context_(ranks.experts), options_(options), layer_(context_, layer_options(ranks, options)) {
    layer_.initialise(1, "bench");
    for (int i = 0; i < options.batches; ++i) {
      const std::int64_t begin = options.tokens * i / options.batches;
      batches_.emplace_back(context_, options, begin, options.tokens * (i + 1) / options.batches - begin);
    }
  }

  std::vector<Row> measure() {
    std::vector<std::vector<std::int64_t>> waits(2);  // nanoseconds in dispatch
    const auto timed = [&](std::size_t way, void (Overlap::*run)()) {
      layer_.take_times();
      (this->*run)();
      waits[way].push_back(static_cast<std::int64_t>(layer_.take_times().dispatch * 1e6));
    };
    const Times times = measure_rounds(
        context_, options_.seconds,
        {{nullptr, [&] { timed(0, &Overlap::one_by_one); }}, {nullptr, [&] { timed(1, &Overlap::in_flight); }}});
    const std::int64_t wrong = sum_over_ranks(context_, count_different());
    std::vector<Row> rows(2);
    for (std::size_t way = 0; way < 2; ++way) {
      rows[way].what = "layer_forward";
      rows[way].p50_us = median(times[way]);
      rows[way].p99_us = percentile(times[way], 0.99);
      rows[way].in_flight = way == 0 ? 1 : options_.batches;
      rows[way].dispatch_us = of_first_rank(waits[way]);
      rows[way].wrong = wrong;
    }
    return rows;
  }

 private:
  /// With bounded plans: a rank that is late is late for the dispatch.
  static MoeLayerOptions layer_options(const Parallel& ranks, const Options& options) {
    MoeLayerOptions layer = bench::layer_options(ranks, options);
    layer.bound = options.tokens;
    return layer;
  }

  /// The last rank is late.
  void come_late() const {
    if (context_.rank() + 1 == context_.size()) std::this_thread::sleep_for(options_.late);
  }

  void one_by_one() {
    for (Batch& batch : batches_) {
      come_late();
      layer_.start_forward(context_, batch.x, batch.out, {}, {}, batch.record).finish();
    }
  }

  void in_flight() {
    std::vector<PendingForward> passes;
    for (Batch& batch : batches_) {
      come_late();
      passes.push_back(layer_.start_forward(context_, batch.x, batch.out, {}, {}, batch.record));
    }
    for (PendingForward& pass : passes) pass.run_experts();
    for (PendingForward& pass : passes) pass.finish();
  }

  /// Elements that differ between the two ways.
  std::int64_t count_different() {
    one_by_one();
    std::vector<Array> wanted;
    for (const Batch& batch : batches_) {
      wanted.emplace_back(options_.dtype, batch.out.view().shape());
      std::memcpy(wanted.back().view().data(), batch.out.view().data(), batch.out.view().byte_size());
    }
    in_flight();
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      const Tensor& out = batches_[i].out.view();
      wrong += count_wrong(out.data(), wanted[i].view().data(), options_.dtype, out.elements());
    }
    return wrong;
  }

  /// Microseconds, the median of its rounds.
  double of_first_rank(const std::vector<std::int64_t>& nanoseconds) const {
    const std::vector<std::int64_t> all = gather_all(context_, nanoseconds);
    return 1e-3 * median({all.begin(), all.begin() + static_cast<std::ptrdiff_t>(nanoseconds.size())});
  }

  Context context_;
  Options options_;
  MoeLayer layer_;
  std::vector<Batch> batches_;
};

}  // namespace

std::vector<Row> measure_overlap(const Parallel& ranks, const Options& options) {
  return Overlap(ranks, options).measure();
}

}  // namespace expar::bench
