// What `expar plan --ascend` adds: the sizes that Ascend's split-phase operators ask for.
#pragma once

#include <nlohmann/json.hpp>

#include "planner/ascend.h"

namespace expar::cli {

/// The keys "ascend_...".
nlohmann::json ascend_as_json(const planner::AscendSizes& sizes);
/// The same as lines on the standard output.
void print_ascend(const planner::AscendSizes& sizes);

}  // namespace expar::cli
