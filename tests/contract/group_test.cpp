// Groups: numbers of their own, the job's memory, the job's fate.
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include <expar/capacity.h>
#include <expar/collectives.h>
#include <expar/dispatch.h>
#include <expar/layer.h>

#include "tests/contract/routes.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

class Groups : public testing::TestWithParam<Way> {};

/// The sum of `value` over the ranks of `context`.
float sum(const Context& context, float value) {
  Array total(DType::f32, {1});
  all_reduce(context, ConstTensor(&value, Shape{1, 1}), total);
  return total.as<float>()[0];
}

TEST_P(Groups, number_their_ranks_by_key_and_then_by_rank) {
  run(GetParam(), [](const Context& context) {
    const int rank = context.rank();
    // Ranks 0, 2, 4 backwards; 1, 3, 5 as they are.
    const Communicator group = context.communicator().split(rank % 2, rank % 2 == 0 ? -rank : 0);
    require_equal(group.size(), 3, "size");
    require_equal(group.rank(), rank % 2 == 0 ? 2 - rank / 2 : rank / 2, "rank in the group");
    for (int i = 0; i < 3; ++i) require_equal(group.job_rank(i), rank % 2 == 0 ? 4 - 2 * i : 2 * i + 1, "job rank");
    require(group.transport_name() == context.communicator().transport_name(), "the transport is the job's");
  });
}

TEST_P(Groups, work_without_waiting_for_each_other) {
  run(GetParam(), [](const Context& context) {
    const int color = context.rank() < 2 ? 0 : 1;
    const Context group = context.on(context.communicator().split(color));
    const float own = static_cast<float>(context.rank());
    for (int i = 0; i < (color == 0 ? 200 : 20); ++i) {
      require_equal(sum(group, own + static_cast<float>(i)),
                    color == 0 ? 1 + 2.0F * static_cast<float>(i) : 14 + 4.0F * static_cast<float>(i),
                    "sum of the group");
    }
    require_equal(sum(context, own), 15.0F, "sum of the job");
  });
}

TEST_P(Groups, can_cross_and_nest) {
  run(GetParam(), [](const Context& context) {
    const int row = context.rank() / 3, column = context.rank() % 3;
    const Context in_row = context.on(context.communicator().split(row));
    const Context in_column = context.on(context.communicator().split(column));
    const Context pair = in_row.on(in_row.communicator().split(column < 2 ? 0 : 1));
    for (int i = 0; i < 20; ++i) {
      const float own = static_cast<float>(context.rank() + i);
      require_equal(sum(in_row, own), static_cast<float>(9 * row + 3 + 3 * i), "sum of the row");
      require_equal(sum(in_column, own), static_cast<float>(2 * column + 3 + 2 * i), "sum of the column");
      require_equal(sum(pair, own), column < 2 ? static_cast<float>(6 * row + 1 + 2 * i) : own, "sum of the pair");
    }
    require_equal(pair.communicator().job_rank(0), 3 * row + (column < 2 ? 0 : 2), "job rank of a nested group");
  });
}

/// Every token to every expert, one expert per rank.
Plan everywhere(const Context& context, std::vector<std::int32_t>& ids) {
  const auto ranks = static_cast<std::int64_t>(context.size());
  ids.clear();
  for (int t = 0; t < 4; ++t) {
    for (std::int32_t e = 0; e < context.size(); ++e) ids.push_back(e);
  }
  return make_plan(context, ConstTensor(ids.data(), Shape{4, ranks}), {.experts = ranks});
}

TEST_P(Groups, keep_several_operations_in_flight_that_end_in_any_order) {
  run(GetParam(), [](const Context& context) {
    const Context row = context.on(context.communicator().split(context.rank() / 3));
    std::vector<std::int32_t> ids;
    const Plan of_job = everywhere(context, ids), of_row = everywhere(row, ids);
    const Array x(DType::f32, Shape{4, 16});
    for (int i = 0; i < 4 * 16; ++i) x.as<float>()[i] = static_cast<float>(context.rank() * 100 + i);
    for (int round = 0; round < 5; ++round) {
      auto first = start_dispatch(context, x, {}, of_job);
      auto second = start_dispatch(row, x, {}, of_row);
      // An even rank waits in its row for an odd one, which waits in the job for the even one's rows.
      const bool row_first = context.rank() % 2 == 0;
      std::optional<Inbox> in_row, in_job;
      if (row_first) in_row = second.finish();
      in_job = first.finish();
      if (!row_first) in_row = second.finish();
      for (int peer = 0; peer < context.size(); ++peer) {
        if (peer == context.rank()) continue;
        const std::int64_t at = of_job.sources()[static_cast<std::size_t>(peer)];
        require_equal(in_job->rows().as<float>()[at * 16 + 17], static_cast<float>(peer * 100 + 17), "row of the job");
      }
      for (int peer = 0; peer < row.size(); ++peer) {
        if (peer == row.rank()) continue;
        const std::int64_t at = of_row.sources()[static_cast<std::size_t>(peer)];
        require_equal(in_row->rows().as<float>()[at * 16 + 17],
                      static_cast<float>(row.communicator().job_rank(peer) * 100 + 17), "row of the row");
      }
    }
  });
}

TEST_P(Groups, come_and_go_without_taking_more_memory) {
  run(GetParam(), [](const Context& context) {
    std::vector<std::int32_t> ids;
    std::size_t settled = 0;
    for (int i = 0; i < 60; ++i) {
      const Context group = context.on(context.communicator().split((context.rank() + i) % 2));
      require_equal(sum(group, 1.0F), 3.0F, "sum");
      const Plan plan = everywhere(group, ids);
      const Array x(DType::f32, Shape{4, 2000});
      dispatch(group, x, {}, plan);
      if (i == 20) settled = group.communicator().arena_bytes();
    }
    require_equal(context.communicator().arena_bytes(), settled, "bytes of the arena after it settled");
  });
}

TEST_P(Groups, are_refused_beyond_fifteen_on_every_rank_alike) {
  run(GetParam(), [](const Context& context) {
    std::vector<Communicator> groups;
    // Rank 0 alone fills its places; the others then find none that it has free.
    for (int i = 0; i < 15; ++i) groups.push_back(context.communicator().split(context.rank() == 0 ? 0 : -1));
    const Error error = error_of([&] { context.communicator().split(0); });
    require(error.code() == ErrorCode::bad_argument, error.what());
    require(error.message() ==
                "group 0 is one too many: between them its ranks are in 15 groups already; let one go before",
            error.message());
    groups.pop_back();
    require_equal(sum(context.on(context.communicator().split(0)), 1.0F), 6.0F, "sum, once there is a place again");
  });
}

TEST_P(Groups, may_be_none) {
  run(GetParam(), [](const Context& context) {
    const Communicator group = context.communicator().split(context.rank() == 1 ? -1 : 7);
    require_equal(static_cast<bool>(group), context.rank() != 1, "a member");
    if (context.rank() == 1) {
      require(error_of([&] { (void)context.on(group); }).message() == "rank 1 is in no group here", "message");
    }
    const Error error = error_of([&] { context.communicator().split(context.rank() == 2 ? -2 : 0); });
    require(error.message() == "group is -2, below -1", error.message());
    require_equal(error.rank(), 2, "rank of the error");
  });
}

TEST_P(Groups, name_ranks_as_the_job_does_and_stay_usable_after_a_mistake) {
  run(GetParam(), [](const Context& context) {
    const Context group = context.on(context.communicator().split(context.rank() / 3));
    const int culprit = context.rank() < 3 ? 1 : 4;
    std::vector<std::int32_t> ids(8, context.rank() == culprit ? 64 : 0);
    const Error bad = error_of([&] { make_plan(group, ConstTensor(ids.data(), Shape{4, 2}), {.experts = 4}); });
    require(bad.code() == ErrorCode::bad_argument, bad.what());
    require_equal(bad.rank(), culprit, "rank of a bad argument");
    std::vector<float> data(8);
    const Error mismatch = error_of(
        [&] { context.rank() == culprit ? barrier(group) : broadcast(group, Tensor(data.data(), Shape{8}), 0); });
    require(mismatch.code() == ErrorCode::mismatch, mismatch.what());
    require_equal(mismatch.rank(), culprit, "rank of a mismatch");
    const std::string first = "rank " + std::to_string(culprit - 1) + " runs broadcast";
    require(mismatch.message().find(first) != std::string::npos, mismatch.message());
    require_equal(sum(group, 1.0F), 3.0F, "sum after the mistakes");
  });
}

TEST_P(Groups, name_the_rank_of_the_job_in_every_error) {
  run(GetParam(), [](const Context& context) {
    const Context group = context.on(context.communicator().split(context.rank() / 3));
    const int first = context.rank() / 3 * 3, culprit = first + 1;
    const bool wrong = context.rank() == culprit;
    const auto expect = [&](int rank, const std::string& operation, const std::function<void()>& call) {
      const Error error = error_of(call);
      require_equal(error.rank(), rank, std::string("the rank of: ") + error.what());
      require(error.operation() == operation, "the operation of: " + std::string(error.what()));
      return error;
    };
    std::vector<float> in(2), out(8);
    expect(culprit, "all_gather",
           [&] { all_gather(group, ConstTensor(in.data(), Shape{2}), Tensor(out.data(), Shape{wrong ? 7 : 6})); });

    const std::vector<std::int32_t> ids(2, 0);
    const ConstTensor id_tensor(ids.data(), Shape{2, 1});
    const Plan plan = make_bounded_plan(group, id_tensor, 2, {.experts = 3});
    expect(first, "dispatch", [&] {
      dispatch(group, ConstTensor(out.data(), Shape{2, 4}), {}, plan, {.layout = Layout::padded, .capacity = 1});
    });

    Routing routing;
    std::vector<float> logits(6);
    for (int t = 0; t < 2; ++t) logits[static_cast<std::size_t>(3 * t + (wrong ? 0 : t))] = 4;
    route(group, {.experts = 3, .topk = 1}, ConstTensor(logits.data(), Shape{2, 3}), routing);
    Capacity capacity;
    const Error full = expect(culprit, "bound_rows", [&] {
      bound_rows(group, {.policy = CapacityPolicy::error, .scope = CapacityScope::per_rank, .rows = 1}, 3, routing.ids,
                 routing, capacity);
    });
    require(full.message().find("by rank " + std::to_string(culprit)) != std::string::npos, full.message());

    MoeLayerOptions layer{.hidden = 4, .inner = 4, .router = {.experts = 3, .topk = 1}};
    layer.router.z = wrong ? 0.5F : 0.25F;
    const Error disagree = expect(culprit, "layer", [&] { MoeLayer(group, layer); });
    require_equal(disagree.peer(), first, "the other rank that disagrees");
    require(disagree.message().find("rank " + std::to_string(culprit) + " has z 0.5") != std::string::npos,
            disagree.message());

    std::vector<Communicator> groups;  // one place is taken
    for (int i = 0; i < 14; ++i) groups.push_back(group.communicator().split(0));
    expect(first, "split", [&] { (void)group.communicator().split(0); });
    require_equal(sum(group, 1.0F), 3.0F, "sum after all these errors");
  });
}

TEST_P(Groups, share_the_jobs_fate) {
  const auto ends = run_all(GetParam(), [](const Context& context) {
    const Context group = context.on(context.communicator().split(context.rank() / 3));
    barrier(group);
    if (context.rank() == 4) group.communicator().abort("the file of weights is gone");
    barrier(context);
  });
  const Error error = expect_same_error(ends);
  EXPECT_EQ(error.message(), "the file of weights is gone");
  EXPECT_EQ(error.rank(), 4);
}

INSTANTIATE_TEST_SUITE_P(Job, Groups, testing::ValuesIn(all_setups({6})), way_name);

}  // namespace
}  // namespace expar::test
