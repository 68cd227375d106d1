// What the contract tests of transports share: the setups they run on, and a barrier made of the seam alone.
#pragma once

#include <expar/transport.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/error_of.h"
#include "tests/multirank/processes.h"

namespace expar::test {

class TransportSuite : public ::testing::TestWithParam<RankSetup> {};

inline std::vector<RankSetup> contract_setups() { return all_setups(); }
inline std::string setup_name(const ::testing::TestParamInfo<RankSetup>& info) { return info.param.name(); }

inline std::uint64_t rank_of(const Transport& transport) { return static_cast<std::uint64_t>(transport.rank()); }

inline Waiting for_test(int peer, Clock::duration limit = std::chrono::seconds(30)) {
  return {.peer = peer, .operation = "test", .what = "its line", .limit = limit};
}

/// Uses the last line of the board; `round` must grow.
inline void barrier(Transport& transport, std::uint64_t round, Clock::duration limit = std::chrono::seconds(30)) {
  constexpr int kIndex = kBoardLines - 1;
  transport.publish(kIndex, {.sequence = round});
  for (int peer = 0; peer < transport.size(); ++peer) {
    transport.wait([&] { return transport.peek(peer, kIndex).sequence >= round; },
                   {.peer = peer, .operation = "barrier", .what = "to start", .limit = limit});
  }
}

}  // namespace expar::test
