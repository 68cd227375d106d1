// What `expar plan --ascend` adds.
#include "cli/plan_ascend.h"

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

namespace expar::cli {
namespace {

/// What the operators ask of memory.
struct AscendMemory {
  std::int64_t rows = 0;                    // A of a rank of MoE experts
  std::optional<std::int64_t> shared_rows;  // A of a shared expert's rank, where there is one
  std::vector<std::int64_t> message_bytes;  // of a dispatched row, by quant_mode
  std::int64_t buffer_bytes = 0, hccl_buffsize = 0;
};

AscendMemory ascend_memory(const planner::AscendSizes& sizes) {
  const ascend::Domain& domain = sizes.domain;
  AscendMemory memory;
  memory.rows = ascend::expand_rows(domain, domain.ep_world_size - 1, sizes.tokens, sizes.topk);
  if (domain.holds_shared(0)) memory.shared_rows = ascend::expand_rows(domain, 0, sizes.tokens, sizes.topk);
  for (std::int64_t mode = 0; mode <= 4; ++mode)
    memory.message_bytes.push_back(ascend::message_bytes(sizes.hidden, DType::bf16, mode));
  memory.buffer_bytes = ascend::hccl_buffer_bytes(domain, sizes.tokens, sizes.hidden, sizes.topk);
  memory.hccl_buffsize = ascend::hccl_buffsize(domain, sizes.tokens, sizes.hidden, sizes.topk);
  return memory;
}

}  // namespace

nlohmann::json ascend_as_json(const planner::AscendSizes& sizes) {
  const AscendMemory memory = ascend_memory(sizes);
  return {{"ascend_rows", memory.rows},
          {"ascend_shared_rows", memory.shared_rows ? nlohmann::json(*memory.shared_rows) : nlohmann::json()},
          {"ascend_message_bytes", memory.message_bytes},
          {"ascend_buffer_bytes", memory.buffer_bytes},
          {"ascend_hccl_buffsize", memory.hccl_buffsize},
          {"ascend_refusals", planner::ascend_refusals(sizes)}};
}

void print_ascend(const planner::AscendSizes& sizes) {
  const AscendMemory memory = ascend_memory(sizes);
  const auto number = [](std::int64_t value) { return static_cast<long long>(value); };
  std::printf("\n%-34s %11lld\n", "Ascend: A, rows of expand_x", number(memory.rows));
  if (memory.shared_rows) std::printf("%-34s %11lld\n", "  on a shared expert's rank", number(*memory.shared_rows));
  for (std::size_t mode = 0; mode < memory.message_bytes.size(); ++mode) {
    const std::string what = "bytes of a row, quant_mode " + std::to_string(mode);
    std::printf("%-34s %11lld\n", what.c_str(), number(memory.message_bytes[mode]));
  }
  std::printf("Ascend: a buffer of %lld bytes at least, HCCL_BUFFSIZE=%lld\n", number(memory.buffer_bytes),
              number(memory.hccl_buffsize));
  for (const std::string& refusal : planner::ascend_refusals(sizes))
    std::printf("  the operators themselves refuse this: %s\n", refusal.c_str());
}

}  // namespace expar::cli
