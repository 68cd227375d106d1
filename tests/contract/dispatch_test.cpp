// What plan, dispatch and combine promise, on every way of connecting ranks.
#include <gtest/gtest.h>

#include <cstring>

#include "tests/contract/experts.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

void round_trip(const Context& context, const Workload& w, DType dtype, Layout layout) {
  Share share(w, context.rank(), dtype);
  const Plan plan = make_plan(context, share.id_tensor(w), {.experts = w.experts, .first_experts = w.first_experts});
  const Inbox inbox = dispatch(context, share.x, share.weights, plan, {.layout = layout});
  check_rows(w, inbox);
  if (layout == Layout::expert_major && plan.received() * w.hidden > 0) {
    for (std::int64_t i = 0; i < plan.received(); ++i) {
      const std::size_t bytes = static_cast<std::size_t>(w.hidden) * size_of(dtype);
      require(
          std::memcmp(inbox.packed().bytes() + static_cast<std::size_t>(i) * bytes, row_bytes(inbox, i), bytes) == 0,
          "a packed row");
    }
  }
  Outbox y = make_outbox(context, plan, w.hidden, dtype);
  multiply(inbox, y);
  combine(context, plan, y, ConstTensor(share.weights), share.out);
  check_out(w, share, context.rank(), true);
  combine(context, plan, y, unweighted, share.out);
  check_out(w, share, context.rank(), false);

  // The same rows again with the lists of the first time.
  const Inbox again = dispatch(context, share.x, {}, plan, {.lists_of = &inbox});
  check_rows(w, again);
}

class Dispatch : public EveryWay {};

TEST_P(Dispatch, carries_each_row_to_its_expert_and_its_result_home) {
  run(GetParam(), [](const Context& context) {
    for (const Workload& w : workloads(context.size())) {
      try {
        round_trip(context, w, DType::f32, Layout::indexed);
        round_trip(context, w, DType::bf16, Layout::expert_major);
      } catch (const std::runtime_error& error) {
        throw std::runtime_error(w.name + ": " + error.what());
      }
    }
  });
}

TEST_P(Dispatch, finishes_split_phases_in_any_order) {
  run(GetParam(), [](const Context& context) {
    const Workload w = workloads(context.size())[2];
    Share a(w, context.rank(), DType::f32), b(w, context.rank(), DType::f32);
    for (int round = 0; round < 40; ++round) {  // more operations than there are slots
      const Plan plan = make_plan(context, a.id_tensor(w), {.experts = w.experts, .first_experts = w.first_experts});
      auto first = start_dispatch(context, a.x, a.weights, plan);
      auto second = start_dispatch(context, b.x, b.weights, plan);
      const bool swap = (context.rank() + round) % 2 == 0;
      Inbox one = (swap ? second : first).finish();
      Inbox two = (swap ? first : second).finish();
      check_rows(w, one);
      check_rows(w, two);
      Outbox y = make_outbox(context, plan, w.hidden, DType::f32), z = make_outbox(context, plan, w.hidden, DType::f32);
      multiply(one, y);
      multiply(two, z);
      auto third = start_combine(context, plan, y, ConstTensor(a.weights), a.out);
      auto fourth = start_combine(context, plan, z, unweighted, b.out);
      (swap ? fourth : third).finish();
      (swap ? third : fourth).finish();
      check_out(w, a, context.rank(), true);
      check_out(w, b, context.rank(), false);
    }
  });
}

TEST_P(Dispatch, keeps_inboxes_alive_in_any_number_and_order) {
  run(GetParam(), [](const Context& context) {
    const Workload w = workloads(context.size())[2];
    Share share(w, context.rank(), DType::f32);
    const Plan plan = make_plan(context, share.id_tensor(w), {.experts = w.experts, .first_experts = w.first_experts});
    std::vector<Inbox> alive;
    for (int round = 0; round < 100; ++round) {
      alive.push_back(dispatch(context, share.x, share.weights, plan));
      // Each rank lets go of another one.
      if (alive.size() > 5) alive.erase(alive.begin() + (round * 3 + context.rank()) % 6);
    }
    for (const Inbox& inbox : alive) check_rows(w, inbox);
    const std::size_t settled = context.communicator().arena_bytes();
    for (int round = 0; round < 200; ++round) check_rows(w, dispatch(context, share.x, share.weights, plan));
    require_equal(context.communicator().arena_bytes(), settled, "bytes of the arena after it settled");
  });
}

TEST_P(Dispatch, brings_a_row_of_any_width_per_slot_home) {
  run(GetParam(), [](const Context& context) {
    for (const Workload& w : workloads(context.size())) {
      Share share(w, context.rank(), DType::f32);
      const Plan plan =
          make_plan(context, share.id_tensor(w), {.experts = w.experts, .first_experts = w.first_experts});
      const Inbox inbox = dispatch(context, share.x, share.weights, plan);
      for (const std::int64_t width : {1, 3}) {
        Outbox values = make_outbox(context, plan, width, DType::f32);
        for (std::int64_t i = 0; i < plan.received() * width; ++i) {
          const float weight = inbox.weights()[static_cast<std::size_t>(i / width)];
          values.rows().as<float>()[i] = weight + static_cast<float>(i % width);
        }
        Array out(DType::f32, Shape{plan.tokens(), w.topk, width});
        fetch_slots(context, plan, values, out);
        for (std::int64_t i = 0; i < plan.tokens() * w.topk * width; ++i) {
          const bool routed = share.ids[static_cast<std::size_t>(i / width)] >= 0;
          const float sent = share.weights.as<float>()[i / width] + static_cast<float>(i % width);
          require_equal(out.as<float>()[i], routed ? sent : 0.0F, "a fetched value");
        }
      }
    }
  });
}

TEST_P(Dispatch, aligns_the_rows_of_each_expert) {
  run(GetParam(), [](const Context& context) {
    const Workload w = workloads(context.size())[2];
    Share share(w, context.rank(), DType::f32);
    const Plan plan = make_plan(context, share.id_tensor(w),
                                {.experts = w.experts, .first_experts = w.first_experts, .alignment = 16});
    for (const std::int64_t offset : plan.offsets()) require_equal(offset % 16, 0, "remainder of an offset");
    const Inbox inbox = dispatch(context, share.x, share.weights, plan, {.layout = Layout::expert_major});
    check_rows(w, inbox);
    Outbox y = make_outbox(context, plan, w.hidden, DType::f32);
    multiply(inbox, y);
    combine(context, plan, y, ConstTensor(share.weights), share.out);
    check_out(w, share, context.rank(), true);
  });
}

TEST_P(Dispatch, brings_each_row_with_the_weight_of_its_own_slot) {
  run(GetParam(), [](const Context& context) {
    // Token t takes expert k in slot k: whoever holds the expert must find the weight of that slot.
    constexpr std::int64_t kTokens = 3, kTopk = 4;
    const Array ids(DType::int32, {kTokens, kTopk}), weights(DType::f32, {kTokens, kTopk});
    const auto weight = [](int rank, std::int64_t t, std::int64_t k) {
      return static_cast<float>(100 * rank + 10 * t + k);
    };
    for (std::int64_t i = 0; i < kTokens * kTopk; ++i) {
      ids.as<std::int32_t>()[i] = static_cast<std::int32_t>(i % kTopk);
      weights.as<float>()[i] = weight(context.rank(), i / kTopk, i % kTopk);
    }
    const Plan plan = make_plan(context, ids, {.experts = kTopk});
    const Array x(DType::f32, {kTokens, 2});
    const Inbox inbox = dispatch(context, x, weights, plan), without = dispatch(context, x, {}, plan);
    auto got = inbox.weights().begin();
    for (std::int64_t e = plan.local().first; e < plan.local().first + plan.local().count; ++e) {
      for (int source = 0; source < context.size(); ++source) {
        for (std::int64_t t = 0; t < kTokens; ++t, ++got) require_equal(*got, weight(source, t, e), "a weight");
      }
    }
    for (const float got_none : without.weights()) require_equal(got_none, 1.0F, "a weight where none are given");
  });
}

TEST_P(Dispatch, refuses_lists_of_another_plan_on_every_rank_and_goes_on) {
  run(GetParam(), [](const Context& context) {
    const std::vector<std::int32_t> ids{0, 1, 2}, others{2, 2, 2};
    const Plan plan = make_plan(context, ConstTensor(ids.data(), Shape{3, 1}), {.experts = 3});
    const Plan another = make_plan(context, ConstTensor(others.data(), Shape{3, 1}), {.experts = 3});
    const Array x(DType::f32, Shape{3, 4});
    const Inbox right = dispatch(context, x, {}, plan), wrong = dispatch(context, x, {}, another);
    const int bad = context.size() - 1;
    const Inbox& lists = context.rank() == bad ? wrong : right;
    const Error error = error_of([&] { dispatch(context, x, {}, plan, {.lists_of = &lists}); });
    require(error.code() == ErrorCode::bad_argument, error.what());
    require(error.message() == "lists_of is the inbox of another plan", error.what());
    require_equal(error.rank(), context.communicator().job_rank(bad), "rank of the error");
    dispatch(context, x, {}, plan, {.lists_of = &right});
  });
}

INSTANTIATE_TEST_SUITE_P(Ways, Dispatch, testing::ValuesIn(every_way()), way_name);

}  // namespace
}  // namespace expar::test
