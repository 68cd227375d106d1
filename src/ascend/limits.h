// What the pages allow a domain to be, and what its operators check alike.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include <expar/ascend/domain.h>
#include <expar/context.h>

namespace expar::ascend {

struct Limits {
  std::int64_t ranks, experts;
  bool shared_halves;  // at most half of the ranks hold shared experts; else all but one
  std::span<const std::string_view> comm_algs;
};
extern const Limits kTwoPhases;  // npu_moe_distribute_{dispatch,combine}_{setup,teardown}
extern const Limits kOnePhase;   // npu_moe_distribute_{dispatch,combine}_v2

/// The domain's own values.
void check_values(const Domain& domain, const Limits& limits);
/// And that the context is the domain's. All throw Error bad_argument, naming the parameter.
void check_domain(const Context& group_ep, const Domain& domain, const Limits& limits);
/// A, the rows of an expand_x [A, ...]: at least expand_rows.
std::int64_t check_rows(const Domain& domain, ConstTensor expand_x, ConstTensor expert_ids);

}  // namespace expar::ascend
