// Rows in groups, as the operators' group lists have them.
#pragma once

#include <cstdint>
#include <vector>

#include "src/ascend/elements.h"

namespace expar::ascend {

/// Offsets [G + 1] of the groups of a list [G] int64: type 0 sums so far, 1 counts. Without a list one group of all.
/// Throws Error: bad_argument (counts below 0, sums that fall, more rows than there are).
std::vector<std::int64_t> group_offsets(const char* what, const ConstTensor& list, std::int64_t type,
                                        std::int64_t rows);

}  // namespace expar::ascend
