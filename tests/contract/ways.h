// Runs a function with a context on every rank of a way of connecting them, and reports what any rank found wrong.
#pragma once

#include <functional>

#include <gtest/gtest.h>

#include <expar/context.h>

#include "tests/error_of.h"
#include "tests/multirank/processes.h"

namespace expar::test {

using Way = RankSetup;

inline std::vector<Way> every_way() { return all_communicators(); }
class EveryWay : public testing::TestWithParam<Way> {};
inline std::string way_name(const testing::TestParamInfo<Way>& info) { return info.param.name(); }

inline std::vector<Outcome> run_all(const Way& way, const std::function<void(const Context&)>& rank_main) {
  return run_communicators(way, [&](Communicator communicator) {
    rank_main(Context(std::move(communicator), {.threads = 1, .backend = "reference"}));
  });
}

inline void run(const Way& way, const std::function<void(const Context&)>& rank_main) {
  expect_success(run_all(way, rank_main));
}

}  // namespace expar::test
