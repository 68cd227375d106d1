// The probes of memory and arithmetic, on all threads of a rank.
#include "bench/limits.h"

#include <algorithm>

#include "bench/workload.h"

namespace expar::bench {
namespace {

constexpr std::int64_t kMiB = std::int64_t{1} << 20;
/// Beyond the last-level cache of any processor that one rank has to itself.
constexpr std::int64_t kLargest = 512 * kMiB;
constexpr double kComputeSeconds = 1e-3;

}  // namespace

ReadProbe::ReadProbe(const Context& context, std::int64_t bytes)
    : context_(context), loops_(fastest_loops()), sums_(static_cast<std::size_t>(context.pool().threads()) * 8) {
  const std::int64_t rows = std::clamp((bytes + kMiB - 1) / kMiB, std::int64_t{1}, kLargest / kMiB);
  memory_ = Array(DType::bf16, Shape{rows, kMiB / 2});
  context_.pool().run(rows, [&](std::int64_t row, int) {
    fill_row(static_cast<std::uint64_t>(row), DType::bf16, kMiB / 2, memory_.view().bytes() + row * kMiB);
  });
}

void ReadProbe::run() {
  const std::int64_t threads = context_.pool().threads();
  const std::int64_t bytes = static_cast<std::int64_t>(memory_.view().byte_size());
  context_.pool().run(threads, [&](std::int64_t i, int) {
    const Part part = part_of(bytes / 4096, static_cast<int>(i), static_cast<int>(threads));
    sums_[static_cast<std::size_t>(i) * 8] =
        loops_.read(memory_.view().bytes() + part.begin * 4096, static_cast<std::size_t>(part.end - part.begin) * 4096);
  });
}

ComputeProbe::ComputeProbe(const Context& context, DType dtype)
    : context_(context),
      loop_(dtype == DType::bf16 ? fastest_loops().flops_bf16 : fastest_loops().flops_f32),
      sinks_(static_cast<std::size_t>(context.pool().threads()) * 16) {
  rounds_ = 1000;
  const auto time_of = [&] {
    const auto start = Clock::now();
    loop_(rounds_, sinks_.data());
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  time_of();  // wakes the wide units up
  const double each = std::min({time_of(), time_of(), time_of()}) / static_cast<double>(rounds_);
  rounds_ = std::clamp(static_cast<std::int64_t>(kComputeSeconds / each), std::int64_t{1000}, std::int64_t{1} << 30);
  flops_ = loop_(rounds_, sinks_.data()) * context.pool().threads();
}

void ComputeProbe::run() {
  context_.pool().run(context_.pool().threads(), [&](std::int64_t i, int) { loop_(rounds_, sinks_.data() + i * 16); });
}

}  // namespace expar::bench
