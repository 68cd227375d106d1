// Rows of bytes on their way: what a setup posts, and what its teardown finds.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include <expar/ascend/distribute.h>

namespace expar::ascend {

/// What a rank posts: rows, and the expert that each goes to.
struct Mail {
  ConstTensor rows;                   // [n, ...] of an even number of bytes; they stay where they are until all is over
  std::vector<std::int32_t> experts;  // [n] or -1: the row stays
  std::vector<std::int64_t> first_experts;  // [W + 1]
  std::int64_t bound = 0;                   // the most rows of any rank, the same on all
  std::vector<NamedNumber> alike;           // what else must be the same on all ranks
  std::vector<NamedNumber> own;             // what the teardown must be told again, besides those
};

/// What a teardown must be told as its setup was: the domain's numbers, and BS.
std::vector<NamedNumber> own_numbers(const Domain& domain, std::int64_t bs);

/// Posts what `write` returns. What it throws becomes an error of the teardown, on every rank, and so does why a
/// context declines already.
CommCmdInfo post(const Context& group_ep, const std::function<Mail()>& write);

/// Where the rows for this rank's experts lie, [R]: expert by expert, in each by source and there in the order posted.
std::vector<const std::byte*> rows_of(const Inbox& inbox);

}  // namespace expar::ascend
