// Replicated plans: each row is computed once, by its owner, and each rank reads its slice of every result.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include <expar/partition.h>

#include "tests/contract/experts.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

class ReplicatedPlan : public EveryWay {};

/// The batch that all ranks have: rank 0's share of `w`.
Plan replicated(const Context& context, const Workload& w, const Share& share) {
  return make_replicated_plan(context, share.id_tensor(w), {.experts = w.experts, .first_experts = w.first_experts});
}

Array columns(const ConstTensor& x, const Part& part) {
  Array slice(x.dtype(), {x.size(0), part.end - part.begin});
  for (std::int64_t t = 0, i = 0; t < x.size(0); ++t) {
    for (std::int64_t h = part.begin; h < part.end; ++h, ++i) set(slice, i, value(x, t * x.size(1) + h));
  }
  return slice;
}

/// What one token's column must be; every step of it is exact but for the roundings to bf16.
float expected(const Workload& w, const Share& share, std::int64_t t, std::int64_t h) {
  const DType dtype = share.x.view().dtype();
  float sum = 0;
  for (std::int64_t k = 0; k < w.topk; ++k) {
    const std::int32_t e = share.ids[static_cast<std::size_t>(t * w.topk + k)];
    if (e >= 0) sum += rounded(w.x(0, t, h) * static_cast<float>(e + 1), dtype) * w.weight(0, t, k);
  }
  return rounded(sum, dtype);
}

void check_slice(const Workload& w, const Share& share, const Part& part, const ConstTensor& out) {
  const std::int64_t wide = part.end - part.begin;
  for (std::int64_t t = 0; t < out.size(0); ++t) {
    for (std::int64_t h = part.begin; h < part.end; ++h)
      require_equal(value(out, t * wide + h - part.begin), expected(w, share, t, h), "a column");
  }
}

TEST_P(ReplicatedPlan, gives_each_rank_its_slice_of_what_the_experts_made) {
  run(GetParam(), [](const Context& context) {
    for (const Workload& w : workloads(context.size())) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        const Share share(w, 0, dtype);
        const Part part = part_of(w.hidden, context.rank(), context.size());
        const Array slices = columns(share.x, part);
        const Array out(dtype, slices.view().shape());
        const Plan plan = replicated(context, w, share);
        const Array joined(dtype, share.x.view().shape());
        join_slices(context, plan, slices, joined);
        for (const Layout layout : {Layout::indexed, Layout::expert_major, Layout::padded}) {
          const auto totals = plan.expert_totals();
          const DispatchOptions options{.layout = layout, .capacity = *std::max_element(totals.begin(), totals.end())};
          const Array& x = layout == Layout::expert_major ? share.x : joined;
          const Inbox inbox = dispatch(context, x, share.weights, plan, options);
          require_equal(inbox.rows().size(0), std::int64_t{0}, "rows of other ranks");
          Outbox y = make_outbox(context, inbox, w.hidden, dtype);
          multiply(inbox, y);
          combine(context, plan, y, ConstTensor(share.weights), out, {.slice = true});
          check_slice(w, share, part, out);
          if (layout != Layout::indexed) continue;
          combine(context, plan, y, ConstTensor(share.weights), share.out);
          check_slice(w, share, {0, w.hidden}, share.out);
        }
      }
    }
  });
}

TEST_P(ReplicatedPlan, adds_slices_of_what_is_shared_and_of_the_residual) {
  run(GetParam(), [](const Context& context) {
    const Workload w = workloads(context.size())[2];
    const Share share(w, 0, DType::f32);
    const Part part = part_of(w.hidden, context.rank(), context.size());
    const Plan plan = replicated(context, w, share);
    const Inbox inbox = dispatch(context, share.x, {}, plan);
    Outbox y = make_outbox(context, inbox, w.hidden, DType::f32);
    multiply(inbox, y);
    const Array residual = columns(share.x, part), out(DType::f32, residual.view().shape());
    combine(context, plan, y, ConstTensor(share.weights), out,
            {.shared = residual, .residual = residual, .slice = true});
    for (std::int64_t i = 0; i < out.view().elements(); ++i) out.as<float>()[i] -= 2 * residual.as<float>()[i];
    check_slice(w, share, part, out);
  });
}

TEST_P(ReplicatedPlan, plans_alone_and_counts_each_row_once) {
  run(GetParam(), [](const Context& context) {
    const Workload w = workloads(context.size())[2];
    const Share share(w, 0, DType::f32);
    if (context.rank() == 0) replicated(context, w, share);  // the others need not know
    const Plan plan = replicated(context, w, share);
    require(!plan.open(), "complete");
    require_equal(plan.unique(), std::int64_t{0}, "rows of other ranks");
    std::int64_t received = plan.received();
    Array all(DType::int64, {context.size(), 1});
    all_gather(context, ConstTensor(&received, {1, 1}), all);
    received = 0;
    for (int r = 0; r < context.size(); ++r) received += all.as<std::int64_t>()[r];
    require_equal(received, plan.tokens() * plan.topk(), "rows of all ranks");
    std::int64_t sent = 0;
    for (int r = 0; r < context.size(); ++r) sent += static_cast<std::int64_t>(plan.sends(r).size());
    require_equal(plan.sent_bytes(5, DType::bf16), sent * 10, "bytes of slices");
  });
}

TEST_P(ReplicatedPlan, joins_the_rows_that_are_read_here_and_no_others) {
  run(GetParam(), [](const Context& context) {
    const std::vector<std::int32_t> ids{0, -1, 1, 2, 2, 0};  // [3, 2] of 3 experts
    const Plan plan = make_replicated_plan(context, ConstTensor(ids.data(), {3, 2}), {.experts = 3});
    const Part part = part_of(7, context.rank(), context.size());
    const Array slices(DType::f32, {3, part.end - part.begin}), x(DType::f32, {3, 7});
    for (std::int64_t t = 0, i = 0; t < 3; ++t) {
      for (std::int64_t h = part.begin; h < part.end; ++h) slices.as<float>()[i++] = static_cast<float>(10 * t + h);
    }
    std::fill_n(x.as<float>(), 21, -1.0F);
    join_slices(context, plan, slices, x);
    for (std::int64_t t = 0; t < 3; ++t) {
      bool here = false;
      for (std::size_t k = 0; k < 2; ++k) {
        const std::int32_t e = ids[static_cast<std::size_t>(t) * 2 + k];
        here = here || (e >= 0 && owner_of(e, context.size(), 3) == context.rank());
      }
      for (std::int64_t h = 0; h < 7; ++h)
        require_equal(x.as<float>()[t * 7 + h], here ? static_cast<float>(10 * t + h) : -1.0F, "a joined element");
    }
  });
}

TEST_P(ReplicatedPlan, tells_every_rank_that_the_ids_of_one_are_wrong_or_differ) {
  run(GetParam(), [](const Context& context) {
    std::vector<std::int32_t> ids{0, 1, 2, 3};
    const Array x(DType::f32, {2, 6}), slices(DType::f32, {2, part_of(6, context.rank(), context.size()).end -
                                                                  part_of(6, context.rank(), context.size()).begin});
    const bool odd = context.rank() == context.size() - 1;
    const auto plan = [&] { return make_replicated_plan(context, ConstTensor(ids.data(), {2, 2}), {.experts = 4}); };
    if (odd) ids[3] = 4;
    const Plan wrong = plan();
    for (const auto& use : {std::function<void()>([&] { dispatch(context, x, {}, wrong); }),
                            std::function<void()>([&] { join_slices(context, wrong, slices, x); })}) {
      const Error error = error_of(use);
      require(error.code() == ErrorCode::bad_argument, error.what());
      require(error.message() == "ids[1,1] = 4 is not below num_experts 4", error.message());
      require_equal(error.rank(), context.communicator().job_rank(context.size() - 1), "the rank");
    }
    if (odd) require(error_of([&] { static_cast<void>(wrong.offsets()); }).message() != "", "no offsets");
    if (context.size() == 1) return;

    ids[3] = odd ? 2 : 3;
    const Plan other = plan();
    require(error_of([&] { dispatch(context, x, {}, other); }).code() == ErrorCode::mismatch, "ids in dispatch");
    require(error_of([&] { join_slices(context, other, slices, x); }).code() == ErrorCode::mismatch, "ids in join");

    ids[3] = 3;  // the communicator is still usable
    const Plan right = plan();
    const Inbox inbox = dispatch(context, x, {}, right);
    Outbox y = make_outbox(context, inbox, 6, DType::f32);
    std::memset(y.rows().data(), 0, y.rows().byte_size());
    const Error error = error_of([&] { combine(context, right, y, unweighted, odd ? x : slices, {.slice = !odd}); });
    require(error.code() == ErrorCode::mismatch, error.what());
    combine(context, right, y, unweighted, slices, {.slice = true});
  });
}

TEST_P(ReplicatedPlan, refuses_what_a_replicated_plan_cannot_do) {
  run(GetParam(), [](const Context& context) {
    const std::vector<std::int32_t> ids{0, 1};
    const ConstTensor id_tensor(ids.data(), {2, 1});
    const Array x(DType::f32, {2, 6}), wrong(DType::f32, {2, 7});
    const auto message = [&](const std::function<void()>& call) {
      const Error error = error_of(call);
      require(error.code() == ErrorCode::bad_argument, error.what());
      return error.message();
    };
    const auto expect = [&](const std::function<void()>& call, const std::string& wanted) {
      const std::string got = message(call);
      require(got == wanted, got);
    };
    const Plan plan = make_replicated_plan(context, id_tensor, {.experts = 2});
    expect([&] { dispatch(context, x, {}, plan, {.layout = Layout::rank_major}); },
           "rows of a replicated plan come from no rank: choose another layout than rank_major");
    expect([&] { join_slices(context, plan, wrong, x); },
           "slices is f32 [2, 7], should be f32 [2, " + std::to_string(part_of(6, 0, context.size()).end) + "]");
    Outbox y = make_outbox(context, plan, 6, DType::f32);
    expect([&] { combine(context, plan, y, unweighted, wrong, {.norm = {.y = x}, .slice = true}); },
           "a slice has no norm: it takes whole rows");
    const Plan plain = make_plan(context, id_tensor, {.experts = 2});
    Outbox plain_y = make_outbox(context, plain, 6, DType::f32);
    expect([&] { combine(context, plain, plain_y, unweighted, x, {.slice = true}); },
           "slices are of a replicated plan");
    expect([&] { join_slices(context, plain, x, x); }, "slices are of a replicated plan");
  });
}

INSTANTIATE_TEST_SUITE_P(Ways, ReplicatedPlan, testing::ValuesIn(every_way()), way_name);

}  // namespace
}  // namespace expar::test
