// What dispatch_v2 and combine_v2 make of their options.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <expar/ascend/distribute_v2.h>

#include "src/ascend/copies.h"
#include "src/ascend/mail.h"

namespace expar::ascend {

/// The domain of the ranks that are left, where some are out; and in which rank of the whole domain each is.
struct Left {
  Domain domain;
  std::vector<std::int32_t> rank_of;  // empty: none is out
};

/// Checked against the context and the pages' limits, options too. Throws Error: bad_argument.
Left ranks_left(const Context& group_ep, const Domain& domain, const V2Options& options);

/// This rank's copies of its tokens.
Copies copies_of(const Domain& domain, const V2Options& options, ConstTensor expert_ids);

/// Posts and takes at once; the options' numbers are compared between ranks too, and its performance_info gets the
/// times that this rank waited.
Inbox exchange(const Context& group_ep, const V2Options& options, const std::function<Mail()>& write);

/// How many tensor-parallel ranks share rows: 1 without a group_tp.
std::int64_t tp_ranks(const V2Options& options);

/// Runs `work`, then, with TP, `share`, which begins with a collective on the tp group: that throws what work throws,
/// on all of its ranks.
void with_tp(const V2Options& options, const std::function<void()>& work, const std::function<void()>& share);

}  // namespace expar::ascend
