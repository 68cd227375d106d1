// The sentences that transports fail with: which rank, what was waited for, how long, what to look at.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include <expar/transport.h>

namespace expar::local {

/// "0.5 s"
std::string seconds(Clock::duration time);

/// "rank 3", "ranks 3 and 4", "ranks 1, 2, 3, 4 and 12 more"
std::string rank_names(std::span<const int> ranks);

/// Rank `rank` of `size` has waited longer than its limit.
Error late(int rank, int size, const Waiting& waiting);
/// `peer` died; `trace` says what is known of it ("pid 1234").
Error died(int rank, int peer, std::string_view trace, const Waiting& waiting);
/// `peer`, which is waited for, ended its part: by an exception, or without one.
Error gone(int rank, int peer, bool in_exception, const Waiting& waiting);

}  // namespace expar::local
