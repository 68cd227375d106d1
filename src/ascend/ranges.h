// What the checks of the operators' parameters share. All throw Error bad_argument, naming parameter, value and range.
#pragma once

#include <cstdint>
#include <string_view>

#include <expar/ascend/domain.h>
#include <expar/context.h>

namespace expar::ascend {

/// "ep_world_size = 1 is not in [2, 384]"
void check_range(std::string_view parameter, std::int64_t value, std::int64_t least, std::int64_t most);
/// "moe_expert_num = 15 is no multiple of ep_world_size - shared_expert_rank_num = 14"; of 0 only 0 is one.
void check_multiple(std::string_view parameter, std::int64_t value, std::string_view of, std::int64_t divisor);

/// The domain's own values, and that the context is the domain's.
void check_domain(const Context& group_ep, const Domain& domain);
/// A, the rows of an expand_x [A, ...]: at least expand_rows.
std::int64_t check_rows(const Domain& domain, ConstTensor expand_x, ConstTensor expert_ids);

}  // namespace expar::ascend
