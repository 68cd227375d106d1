// Bounded plans: the same bytes as exact ones, one meeting less, and every error still on every rank.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <thread>

#include <expar/collectives.h>

#include "tests/contract/experts.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

class BoundedPlan : public EveryWay {};

void require_text(const std::string& got, const std::string& wanted) { require(got == wanted, "got: " + got); }

void step(const Context& context, const Workload& w, Share& share, std::int64_t bound) {
  const Plan plan = plan_of(context, w, share, bound);
  const Inbox inbox = dispatch(context, share.x, share.weights, plan);
  check_rows(w, inbox);
  Outbox y = make_outbox(context, inbox.plan(), w.hidden, DType::f32);
  multiply(inbox, y);
  combine(context, inbox.plan(), y, ConstTensor(share.weights), share.out);
}

TEST_P(BoundedPlan, gives_the_same_bytes_as_an_exact_plan) {
  run(GetParam(), [](const Context& context) {
    for (const Workload& w : workloads(context.size())) {
      Share exact(w, context.rank(), DType::f32), bounded(w, context.rank(), DType::f32);
      step(context, w, exact, 0);
      const std::int64_t most = *std::max_element(w.tokens.begin(), w.tokens.end());
      for (const std::int64_t bound : {std::max<std::int64_t>(most, 1), most + 7}) {
        step(context, w, bounded, bound);
        const std::size_t bytes = exact.out.view().byte_size();
        require(bytes == 0 || std::memcmp(exact.out.view().data(), bounded.out.view().data(), bytes) == 0, w.name);
      }
    }
  });
}

TEST_P(BoundedPlan, serves_everything_that_an_exact_plan_serves) {
  run(GetParam(), [](const Context& context) {
    const Workload w = workloads(context.size())[2];
    Share a(w, context.rank(), DType::f32), b(w, context.rank(), DType::f32);
    for (int round = 0; round < 34; ++round) {  // more operations than there are slots
      const Plan plan = make_bounded_plan(context, a.id_tensor(w), 11,
                                          {.experts = w.experts, .first_experts = w.first_experts, .alignment = 4});
      auto first = start_dispatch(context, a.x, a.weights, plan, {.layout = Layout::expert_major});
      auto second = start_dispatch(context, b.x, {}, plan);
      const bool swap = (context.rank() + round) % 2 == 0;
      Inbox one = (swap ? second : first).finish();
      Inbox two = (swap ? first : second).finish();
      if (swap) std::swap(one, two);
      check_rows(w, one);
      const Inbox again = dispatch(context, a.x, {}, one.plan(), {.lists_of = &one});
      check_rows(w, again);
      Outbox y = make_outbox(context, two, w.hidden, DType::f32);
      multiply(two, y);
      combine(context, two.plan(), y, ConstTensor(a.weights), a.out);
      check_out(w, a, context.rank(), true);
    }
  });
}

TEST_P(BoundedPlan, tells_all_ranks_who_has_more_tokens_than_the_bound_and_goes_on) {
  run(GetParam(), [](const Context& context) {
    const int bad = context.size() - 1;
    const std::int64_t tokens = context.rank() == bad ? 9 : 3;
    std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens), 1);
    const Array x(DType::f32, Shape{tokens, 4});
    const auto send = [&] {
      const Plan plan = make_bounded_plan(context, ConstTensor(ids.data(), Shape{tokens, 1}), 8, {.experts = 4});
      dispatch(context, x, {}, plan);
    };
    const Error error = error_of(send);
    require(error.code() == ErrorCode::bad_argument, error.what());
    require_text(error.what(),
                 "rank " + std::to_string(bad) + ": dispatch: 9 tokens are more than the plan's bound of 8");

    std::fill(ids.begin(), ids.end(), context.rank() == bad ? 4 : 0);
    const Error wrong = error_of([&] {
      const Plan plan = make_bounded_plan(context, ConstTensor(ids.data(), Shape{tokens, 1}), 9, {.experts = 4});
      dispatch(context, x, {}, plan);
    });
    require_text(wrong.what(), "rank " + std::to_string(bad) + ": dispatch: ids[0,0] = 4 is not below num_experts 4");

    const DispatchOptions small{.layout = Layout::padded, .capacity = 1};
    std::fill(ids.begin(), ids.end(), 2);
    const Error full = error_of([&] {
      const Plan plan = make_bounded_plan(context, ConstTensor(ids.data(), Shape{tokens, 1}), 9, {.experts = 4});
      dispatch(context, x, {}, plan, small);
    });
    require(full.code() == ErrorCode::bad_argument && full.rank() == 0, full.what());
    barrier(context);
  });
}

TEST_P(BoundedPlan, tells_all_ranks_who_disagrees) {
  if (GetParam().ranks == 1) return;
  run(GetParam(), [](const Context& context) {
    const bool odd = context.rank() == context.size() - 1;
    const std::vector<std::int32_t> ids(6, 1);
    const Array x(DType::f32, Shape{3, 4});
    const auto bounded = [&](Shape shape, std::int64_t bound, std::int64_t experts) {
      return make_bounded_plan(context, ConstTensor(ids.data(), shape), bound, {.experts = experts});
    };
    const auto check = [&](const std::function<Plan()>& make, const std::string& part) {
      const Error error = error_of([&] { dispatch(context, x, {}, make()); });
      require(error.code() == ErrorCode::mismatch, error.what());
      require(error.message().find(part) != std::string::npos, error.message());
      barrier(context);
    };
    check([&] { return bounded({3, 2}, odd ? 8 : 9, 4); }, "bound 8");
    check([&] { return bounded({3, 2}, 9, odd ? 5 : 4); }, "experts 5");
    check([&] { return bounded(odd ? Shape{3, 1} : Shape{3, 2}, 9, 4); }, "topk 1");
    check(
        [&] {
          return odd ? make_plan(context, ConstTensor(ids.data(), {3, 2}), {.experts = 4}) : bounded({3, 2}, 9, 4);
        },
        "runs plan (");
  });
}

TEST_P(BoundedPlan, says_what_an_open_plan_cannot_do) {
  run(GetParam(), [](const Context& context) {
    const std::vector<std::int32_t> ids(3, 1);
    const Plan plan = make_bounded_plan(context, ConstTensor(ids.data(), Shape{3, 1}), 3, {.experts = 4});
    require(plan.open() && plan.tokens() == 3, "an open plan");
    const Array x(DType::f32, Shape{3, 4});
    const Inbox inbox = dispatch(context, x, {}, plan);
    require(!inbox.plan().open(), "the inbox's plan is complete");
    Outbox y = make_outbox(context, inbox.plan(), 4, DType::f32);
    const std::string text = "the plan is bounded and still open; the inbox of its dispatch has the complete one";
    require_text(error_of([&] { make_outbox(context, plan, 4, DType::f32); }).message(), text);
    require_text(error_of([&] { combine(context, plan, y, unweighted, x.view()); }).message(), text);
    require_text(error_of([&] { plan.received(); }).message(), text);
    barrier(context);
  });
}

/// Meetings at which this rank has waited for others: operations and what of them was waited for.
std::set<std::string> meetings(const Trace& trace) {
  std::set<std::string> all;
  for (const Span& span : trace.spans()) {
    if (span.kind == Span::Kind::wait) all.insert(std::string(span.name) + " " + std::string(span.what));
  }
  return all;
}

/// What a rank waits for in decoding 8 tokens while rank 0 is late wherever it can be.
std::set<std::string> waits(const Context& context, std::int64_t bound) {
  const Workload w{"decode", context.size(), 16, 4, 32, Pattern::uniform, std::vector<std::int64_t>(8, 8)};
  Share share(w, context.rank(), DType::f32);
  const auto linger = [&] {
    if (context.rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  };
  barrier(context);
  const auto trace = std::make_shared<Trace>();
  context.communicator().record(trace);
  linger();
  const Plan plan = plan_of(context, w, share, bound);
  linger();
  const Inbox inbox = dispatch(context, share.x, share.weights, plan);
  Outbox y = make_outbox(context, inbox.plan(), w.hidden, DType::f32);
  multiply(inbox, y);
  linger();
  combine(context, inbox.plan(), y, ConstTensor(share.weights), share.out);
  context.communicator().record(nullptr);
  check_out(w, share, context.rank(), true);
  return meetings(*trace);
}

TEST_P(BoundedPlan, waits_for_peers_at_most_twice_in_dispatch_and_combine) {
  const Way way = GetParam();
  if (way.ranks == 1) return;
  run(way, [&](const Context& context) {
    const std::size_t most = way.mapping ? 2 : 4;  // a rank that is not mapped sends after the meeting
    bool more_when_exact = false;
    for (int round = 0; round < 3; ++round) {
      const auto bounded = waits(context, 8);
      require(bounded.size() <= most, "meetings of a bounded plan: " + std::to_string(bounded.size()));
      const auto exact = waits(context, 0);
      more_when_exact = more_when_exact || exact.size() > 2;
    }
    require(more_when_exact || context.rank() == 0, "an exact plan waits more often, so this test can fail");
  });
}

TEST_P(BoundedPlan, takes_no_more_memory_after_the_first_steps) {
  run(GetParam(), [](const Context& context) {
    const Workload w{"decode", context.size(), 16, 4, 32, Pattern::uniform, std::vector<std::int64_t>(8, 8)};
    Share share(w, context.rank(), DType::f32);
    step(context, w, share, 8);
    const std::size_t settled = context.communicator().arena_bytes();
    for (int round = 0; round < 100; ++round) step(context, w, share, 8);
    require_equal(context.communicator().arena_bytes(), settled, "bytes of the arena");
  });
}

INSTANTIATE_TEST_SUITE_P(Ways, BoundedPlan, testing::ValuesIn(every_way()), way_name);

}  // namespace
}  // namespace expar::test
