// The split-phase operators of npu_moe_distribute in domains of many ranks.
#include <gtest/gtest.h>

#include "tests/contract/ascend_rank.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

TEST(DistributeSizes, may_be_any_number_of_ranks) {
  for (const int ranks : {11, 33, 60}) {
    Batch batch = random_batch(ranks, static_cast<std::uint64_t>(ranks), 2);
    std::vector<std::vector<std::int32_t>> drawn;
    for (int rank = 0; rank < ranks; ++rank) drawn.push_back(batch.ids(rank));
    batch.chosen = drawn;
    run({.ranks = ranks}, [&](const Context& context) {
      const AscendRank rank(context, batch, {});
      rank.dispatch_teardown(rank.dispatch_setup());
      check_dispatched(rank, batch, [&](const Copy& copy, std::int64_t row) {
        for (std::int64_t i = 0; const float x : batch.x(copy.source, copy.token))
          require_near(element(rank.expand_x, row * batch.h + i++), static_cast<float>(bf16(x)), 0,
                       [&] { return batch.str() + ": a row"; });
      });
    });
  }
}

#ifndef __SANITIZE_THREAD__  // which takes a minute for so many threads
TEST(DistributeSizes, grow_to_the_largest_domain) {
  // 384 ranks on threads; 6 of them hold two shared experts, and half of them one, whose ranks get two rows each.
  for (const Batch& batch : {even_batch(384, 6, 2, 378, 2, 1), even_batch(384, 192, 1, 192, 1, 1)}) {
    run({.ranks = 384, .patience = std::chrono::seconds(300)}, [&](const Context& context) {
      const AscendRank rank(context, batch, {.quant_mode = 2});
      rank.dispatch_teardown(rank.dispatch_setup());
      const auto mine = copies_for(batch, context.rank());
      EXPECT_EQ(rank.nums.as<std::int64_t>()[0], std::ssize(mine[0]));
      rank.combine_teardown(rank.combine_setup());
    });
  }
}
#endif

}  // namespace
}  // namespace expar::test
