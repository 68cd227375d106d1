// The probes of memory and arithmetic, on all threads of a rank.
#include "bench/limits.h"

#include <algorithm>
#include <cstring>

#include "bench/workload.h"

namespace expar::bench {
namespace {

constexpr std::int64_t kMiB = std::int64_t{1} << 20;
/// Beyond the last-level cache of any processor that one rank has to itself.
constexpr std::int64_t kLargest = 512 * kMiB;
constexpr double kComputeSeconds = 1e-3;

/// At least `bytes`, in rows of a MiB, none of them zero.
Array filled(const Context& context, std::int64_t bytes) {
  const std::int64_t rows = std::clamp((bytes + kMiB - 1) / kMiB, std::int64_t{1}, kLargest / kMiB);
  Array memory(DType::bf16, Shape{rows, kMiB / 2});
  context.pool().run(rows, [&](std::int64_t row, int) {
    fill_row(static_cast<std::uint64_t>(row), DType::bf16, kMiB / 2, memory.view().bytes() + row * kMiB);
  });
  return memory;
}

/// Calls work(thread, first byte, bytes) for each thread's part of `memory`.
template <class Work>
void share_out(const Context& context, const Array& memory, const Work& work) {
  const std::int64_t threads = context.pool().threads();
  const std::int64_t bytes = static_cast<std::int64_t>(memory.view().byte_size());
  context.pool().run(threads, [&](std::int64_t i, int) {
    const Part part = part_of(bytes / 4096, static_cast<int>(i), static_cast<int>(threads));
    work(static_cast<std::size_t>(i), part.begin * 4096, static_cast<std::size_t>(part.end - part.begin) * 4096);
  });
}

}  // namespace

ReadProbe::ReadProbe(const Context& context, std::int64_t bytes)
    : context_(context),
      loops_(fastest_loops()),
      memory_(filled(context, bytes)),
      sums_(static_cast<std::size_t>(context.pool().threads()) * 8) {}

void ReadProbe::run() {
  share_out(context_, memory_, [&](std::size_t thread, std::int64_t first, std::size_t bytes) {
    sums_[thread * 8] = loops_.read(memory_.view().bytes() + first, bytes);
  });
}

MemcpyProbe::MemcpyProbe(const Context& context, std::int64_t bytes)
    : context_(context), from_(filled(context, bytes)), to_(filled(context, bytes)) {}

void MemcpyProbe::run() {
  share_out(context_, from_, [&](std::size_t, std::int64_t first, std::size_t bytes) {
    std::memcpy(to_.view().bytes() + first, from_.view().bytes() + first, bytes);
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
