// Group lists to offsets.
#include "src/ascend/groups.h"

namespace expar::ascend {

std::vector<std::int64_t> group_offsets(const char* what, const ConstTensor& list, std::int64_t type,
                                        std::int64_t rows) {
  if (list.absent()) return {0, rows};
  require_axes(what, list, 1);
  require(what, list, DType::int64, list.shape());
  std::vector<std::int64_t> offsets{0};
  for (std::int64_t g = 0; g < list.size(0); ++g) {
    const std::int64_t before = offsets.back(), value = list.as<std::int64_t>()[g];
    require_range(what, g, value, type == 0 ? before : 0, type == 0 ? rows : rows - before);
    offsets.push_back(type == 0 ? value : before + value);
  }
  return offsets;
}

}  // namespace expar::ascend
