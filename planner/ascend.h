// What Ascend's split-phase dispatch and combine refuse.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <expar/ascend/domain.h>

namespace expar::planner {

struct AscendSizes {
  ascend::Domain domain;
  std::int64_t tokens = 0;  // BS, of each rank
  std::int64_t hidden = 0;  // H
  std::int64_t topk = 0;    // K
};

/// A sentence for each of BS, H and K, and one for the first value of the domain, that the operators refuse.
/// Source: the page of torch_npu.npu_moe_distribute_combine_setup, its ranges of parameters.
std::vector<std::string> ascend_refusals(const AscendSizes& sizes);

}  // namespace expar::planner
