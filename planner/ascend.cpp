// The formula and the ranges of the page.
#include "planner/ascend.h"

namespace expar::planner {
namespace {

std::int64_t align(std::int64_t value, std::int64_t to) { return (value + to - 1) / to * to; }

}  // namespace

std::int64_t ascend_buffer_bytes(const AscendSizes& sizes) {
  const std::int64_t local = (sizes.experts + sizes.ranks - 1) / sizes.ranks;
  const std::int64_t row = 2 * sizes.hidden;  // fp16 or bf16
  return 2 * (local * sizes.tokens * sizes.ranks * align(align(row, 32) + 44, 512) +
              (sizes.topk + sizes.shared_experts) * sizes.tokens * align(row, 512));
}

std::vector<std::string> ascend_refusals(const AscendSizes& sizes) {
  std::vector<std::string> refusals;
  const auto bound = [&](const char* what, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value >= least && value <= most) return;
    refusals.push_back(std::string(what) + " " + std::to_string(value) + " is not from " + std::to_string(least) +
                       " to " + std::to_string(most));
  };
  bound("ep_world_size", sizes.ranks, 2, 384);
  bound("moe_expert_num", sizes.experts, 1, 512);
  bound("BS", sizes.tokens, 1, 512);
  bound("H", sizes.hidden, 1024, 8192);
  bound("K", sizes.topk, 1, 16);
  if (sizes.experts % sizes.ranks != 0) {
    refusals.push_back("moe_expert_num " + std::to_string(sizes.experts) + " is no multiple of ep_world_size " +
                       std::to_string(sizes.ranks));
  }
  return refusals;
}

}  // namespace expar::planner
