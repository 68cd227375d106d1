// A rank that is killed in the middle of a layer: everybody else says so, at once, and nothing is left behind.
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <filesystem>
#include <thread>

#include <expar/collectives.h>
#include <expar/dispatch.h>

#include "tests/contract/routes.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

enum class Where { dispatch, experts, combine };

struct Case {
  Where where;
  int ranks, victim;
  bool mapping;
};

std::string case_name(const testing::TestParamInfo<Case>& info) {
  const char* const names[] = {"in_dispatch", "in_experts", "in_combine"};
  return std::string(names[static_cast<int>(info.param.where)]) + "_" + std::to_string(info.param.victim) + "_of_" +
         std::to_string(info.param.ranks) + (info.param.mapping ? "" : "_unmapped");
}

/// dispatch, "experts" and combine, over and over; the victim dies at `where` of the third round.
void rounds(const Context& context, const Case& c, std::atomic<std::int64_t>& death, std::int64_t& waiting_since) {
  const auto wait_from_now = [&] { waiting_since = Clock::now().time_since_epoch().count(); };
  const auto die = [&](Where where, int round) {
    if (round != 3 || where != c.where || context.rank() != c.victim) return;
    death = Clock::now().time_since_epoch().count();
    raise(SIGKILL);
  };
  const Workload w = workloads(context.size()).at(9);
  const auto ids = w.ids(context.rank());
  const std::int64_t tokens = w.tokens[0];
  const Array x(DType::f32, Shape{tokens, w.hidden});
  Array out(DType::f32, Shape{tokens, w.hidden});
  for (int round = 0; round < 1000; ++round) {
    wait_from_now();
    const Plan plan = make_plan(context, ConstTensor(ids.data(), Shape{tokens, w.topk}), {.experts = w.experts});
    auto pending = start_dispatch(context, x, {}, plan);
    die(Where::dispatch, round);
    wait_from_now();
    const Inbox inbox = pending.finish();
    Outbox y = make_outbox(context, plan, w.hidden, DType::f32);
    die(Where::experts, round);
    auto sum = start_combine(context, plan, y, unweighted, out);
    die(Where::combine, round);
    wait_from_now();
    sum.finish();
  }
}

class Death : public testing::TestWithParam<Case> {};

/// Kills the victim once; returns how long the slowest survivor took to throw, from the death or from its next wait.
std::chrono::duration<double, std::milli> kill_one(const Case& c) {
  Shared<std::atomic<std::int64_t>> death;
  Shared<std::array<std::atomic<std::int64_t>, 8>> took;
  const auto ends = run_all({Kind::shm, c.ranks, c.mapping}, [&](const Context& context) {
    std::int64_t waiting_since = 0;
    try {
      rounds(context, c, *death, waiting_since);
    } catch (const Error&) {
      const std::int64_t now = Clock::now().time_since_epoch().count();
      (*took)[static_cast<std::size_t>(context.rank())] = now - std::max<std::int64_t>(*death, waiting_since);
      throw;
    }
  });
  EXPECT_EQ(ends[static_cast<std::size_t>(c.victim)].signal, SIGKILL);
  const Error error = expect_same_error(ends, c.victim);
  EXPECT_EQ(error.code(), ErrorCode::peer_lost) << error.what();
  EXPECT_EQ(error.peer(), c.victim) << error.what();
  return Clock::duration(*std::max_element(took->begin(), took->end()));
}

TEST_P(Death, is_named_by_every_survivor_within_50_ms) {
  const auto files = [] { return std::distance(std::filesystem::directory_iterator("/dev/shm"), {}); };
  const auto before = files();
  // Ranks that outnumber the cores of a busy machine may be late for no fault of theirs, but not every time.
  double best = 1e9;
  for (int attempt = 0; attempt < 6 && best >= 50; ++attempt) best = std::min(best, kill_one(GetParam()).count());
  EXPECT_LT(best, 50);
  EXPECT_EQ(files(), before) << "something is left in /dev/shm";
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const Where where : {Where::dispatch, Where::experts, Where::combine}) {
    for (const bool mapping : {true, false}) {
      all.push_back({where, 2, 0, mapping});
      all.push_back({where, 2, 1, mapping});
      all.push_back({where, 4, 2, mapping});
      all.push_back({where, 8, 0, mapping});
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Killed, Death, testing::ValuesIn(cases()), case_name);

}  // namespace
}  // namespace expar::test
