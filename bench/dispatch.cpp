// Dispatch beside a plain copy of the rows it sends, and combine beside a plain read of the rows it takes.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "bench/peers.h"
#include "bench/timing.h"
#include "bench/workload.h"

namespace expar::bench {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

/// The times of an operation (step 0) and of its probe (step 1, where there is one).
Row make_row(const char* what, const Times& times, std::int64_t bytes, std::int64_t wrong) {
  Row row;
  row.what = what;
  row.p50_us = median(times[0]);
  row.p99_us = percentile(times[0], 0.99);
  row.bytes = bytes;
  row.wrong = wrong;
  if (bytes > 0) row.gbps = static_cast<double>(bytes) / row.p50_us * 1e-3;
  if (times.size() < 2) return row;
  std::vector<double> ratios;
  for (std::size_t i = 0; i < times[0].size(); ++i) ratios.push_back(times[1][i] / times[0][i]);
  row.of_copy = median(ratios);
  return row;
}

Plan plan_of(const Context& context, const Workload& workload) {
  const Phase phase(context.trace(), "plan");
  return make_plan(context, workload.ids(), {.experts = workload.options().experts});
}

/// What the experts would have written: row by row of a table.
Array made_up_answers(const Workload& workload, const Plan& plan, int slice) {
  const Options& options = workload.options();
  Array answers(options.dtype, Shape{plan.received(), options.hidden});
  const std::size_t row_bytes = at(options.hidden) * size_of(options.dtype);
  for (std::size_t e = 0; e < workload.arrivals().size(); ++e) {
    std::byte* to = answers.view().bytes() + at(plan.offsets()[e]) * row_bytes;
    for (const Arrival& arrival : workload.arrivals()[e]) {
      fill_row(workload.answer_row(arrival, slice), options.dtype, options.hidden, to);
      to += row_bytes;
    }
  }
  return answers;
}

/// As rows of `dtype` hold them.
void round_to(DType dtype, std::vector<float>& values) {
  if (dtype == DType::f32) return;
  for (float& value : values) value = static_cast<float>(bf16(value));
}

/// Elements of `out` that are not these columns of the weighted sums of the answers to `tokens`. Every product and sum
/// over slots is exact in f32, so only the roundings count, of each slice's part and of their sum, and no tolerance is
/// needed.
std::int64_t count_wrong_sums(const Workload& workload, const std::vector<std::int64_t>& tokens, const Part& columns,
                              ConstTensor out) {
  const Options& options = workload.options();
  const std::int64_t width = out.size(1);
  std::vector<float> sum(at(options.hidden)), part(sum), answer(sum);
  std::vector<std::byte> wanted(at(options.hidden) * size_of(options.dtype));
  const Tensor wanted_row(wanted.data(), options.dtype, Shape{options.hidden});
  std::int64_t wrong = 0;
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    std::fill(sum.begin(), sum.end(), 0.0F);
    for (int slice = 0; slice < workload.slices(); ++slice) {
      std::fill(part.begin(), part.end(), 0.0F);
      for (std::int64_t k = 0; k < options.topk; ++k) {
        if (workload.id(tokens[t], k) < 0) continue;
        fill_row(workload.answer_row({tokens[t], k}, slice), DType::f32, options.hidden, answer.data());
        const float weight = workload.weight(tokens[t], k);
        for (std::size_t c = 0; c < part.size(); ++c) part[c] += weight * answer[c];
      }
      round_to(options.dtype, part);
      for (std::size_t c = 0; c < sum.size(); ++c) sum[c] += part[c];
    }
    for (std::size_t c = 0; c < sum.size(); ++c) {
      if (options.dtype == DType::f32) wanted_row.as<float>()[c] = sum[c];
      if (options.dtype == DType::bf16) wanted_row.as<bf16>()[c] = bf16(sum[c]);
    }
    const std::size_t size = size_of(options.dtype);
    wrong +=
        count_wrong(out.bytes() + t * at(width) * size, wanted.data() + at(columns.begin) * size, options.dtype, width);
  }
  return wrong;
}

/// What one rank combines: its own tokens, whole, and their sums over slices; in a hidden partition all tokens, in its
/// columns.
struct Combined {
  Combined(const Parallel& ranks, const Workload& workload) {
    const Context& context = ranks.experts;
    const Options& options = workload.options();
    const bool hidden = options.hidden_partition;
    plan = hidden ? make_replicated_plan(context, workload.all_ids(), {.experts = options.experts})
                  : make_plan(context, workload.ids(), {.experts = options.experts});
    tokens = workload.tokens();
    if (hidden) {
      tokens.resize(at(plan.tokens()));
      std::iota(tokens.begin(), tokens.end(), std::int64_t{0});
    }
    columns = hidden ? part_of(options.hidden, context.rank(), context.size()) : Part{0, options.hidden};
    weights = Array(DType::f32, Shape{plan.tokens(), options.topk});
    for (std::int64_t i = 0; i < weights.view().elements(); ++i) {
      weights.as<float>()[i] = workload.weight(tokens[at(i / options.topk)], i % options.topk);
    }
    out = Array(options.dtype, Shape{plan.tokens(), columns.end - columns.begin});
  }
  /// Read from other ranks: results, then the parts of the rows that are summed here, then the sums of the others.
  std::int64_t bytes(const Parallel& ranks) const {
    std::int64_t rows = 0;
    for (const SlotRow& slot : plan.slots()) rows += slot.rank >= 0 && slot.rank != ranks.experts.rank();
    const Part summed = part_of(plan.tokens(), ranks.slice(), ranks.slice_count());
    const std::int64_t here = summed.end - summed.begin;
    rows += (ranks.slice_count() - 1) * here + plan.tokens() - here;
    return rows * out.view().size(1) * static_cast<std::int64_t>(size_of(out.view().dtype()));
  }

  Plan plan;
  std::vector<std::int64_t> tokens;  // counted over all ranks
  Part columns;
  Array weights, out;
};

/// Of all experts: what the padded layout must hold.
std::int64_t most_rows(const Plan& plan) {
  const auto totals = plan.expert_totals();
  return *std::max_element(totals.begin(), totals.end());
}

}  // namespace

std::vector<Row> measure_dispatch(const Parallel& ranks, const Options& options) {
  const Context& context = ranks.experts;
  const Workload workload(ranks, options);
  Inbox inbox;
  DispatchOptions dispatch_options{.layout = options.layout};
  const auto run = [&] {
    const Plan plan = plan_of(context, workload);
    const Phase phase(context.trace(), "dispatch");
    dispatch_options.capacity = most_rows(plan);
    inbox = dispatch(context, workload.x(), workload.weights(), plan, dispatch_options);
  };
  run();
  std::int64_t wrong = count_wrong(workload, inbox);
  const Plan plan = inbox.plan();

  std::uint64_t used = 0;
  const auto use = [&] { used += use_memory(inbox.rows().data(), inbox.rows().byte_size()); };
  CopyProbe probe(context, workload.x(), plan);
  // The inbox goes back to the arena just after its reader has used it, and the next one takes its place.
  std::vector<Step> steps{{[&] {
                             use();
                             inbox = Inbox();
                           },
                           run}};
  if (probe.possible() && context.size() > 1) {
    steps.push_back({[&] { probe.use(); }, [&] { probe.copy(); }});
  }
  const Times times = measure_rounds(ranks.all, options.seconds, steps);
  wrong += count_wrong(workload, inbox);
  const std::int64_t bytes = sum_over_ranks(ranks.all, plan.sent_bytes(options.hidden, options.dtype));
  return {make_row("dispatch", times, bytes, sum_over_ranks(ranks.all, wrong))};
}

std::vector<Row> measure_combine(const Parallel& ranks, const Options& options) {
  const Context& context = ranks.experts;
  const Workload workload(ranks, options);
  const Combined combined(ranks, workload);
  const Plan& plan = combined.plan;
  const Array answers = made_up_answers(workload, plan, ranks.slice());
  Outbox y = make_outbox(context, plan, options.hidden, options.dtype);
  // Experts have just written their results when combine starts.
  const auto answer = [&] {
    barrier(context);  // until then another rank may still be reading the last ones
    if (y.rows().byte_size() > 0) std::memcpy(y.rows().data(), answers.view().data(), y.rows().byte_size());
  };
  const auto run = [&] {
    const Phase phase(context.trace(), "combine");
    combine(context, plan, y, ConstTensor(combined.weights), combined.out,
            {.slice = options.hidden_partition, .sum_over = ranks.tensor});
  };
  const auto count_wrong_now = [&] {
    return count_wrong_sums(workload, combined.tokens, combined.columns, combined.out);
  };
  answer();
  run();
  std::int64_t wrong = count_wrong_now();

  FetchProbe probe(context, plan, y);
  std::vector<Step> steps{{answer, run}};
  // It reads whole rows and sums nothing.
  const bool probes = probe.possible() && context.size() > 1 && !options.hidden_partition && !ranks.tensor;
  if (probes) steps.push_back({answer, [&] { probe.read(); }});
  const Times times = measure_rounds(ranks.all, options.seconds, steps);
  wrong += count_wrong_now();
  const std::int64_t bytes = sum_over_ranks(ranks.all, combined.bytes(ranks));
  return {make_row("combine", times, bytes, sum_over_ranks(ranks.all, wrong))};
}

}  // namespace expar::bench
