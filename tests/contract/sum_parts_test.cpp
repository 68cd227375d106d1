// Combine where experts lie in slices: what it gives is the sum of parts that ranks hold, on meshes of ep x tp.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include <expar/collectives.h>
#include <expar/dispatch.h>
#include <expar/mesh.h>

#include "tests/contract/experts.h"
#include "tests/contract/forwarding.h"
#include "tests/contract/ways.h"
#include "transports/threads/threads.h"

namespace expar::test {
namespace {

struct Place {
  Way way;
  int ep = 1, tp = 2;
};

std::vector<Place> every_place() {
  std::vector<Place> places;
  for (const auto& [ep, tp] : std::vector<std::pair<int, int>>{{1, 2}, {1, 3}, {2, 2}, {2, 3}}) {
    for (const Way& way : all_setups({ep * tp})) places.push_back({way, ep, tp});
  }
  return places;
}

class EveryMesh : public testing::TestWithParam<Place> {
 protected:
  /// With a context along ep, and the group along tp.
  static void run_mesh(const std::function<void(const Context&, const Communicator&)>& body) {
    expect_success(outcomes(body));
  }
  static std::vector<Outcome> outcomes(const std::function<void(const Context&, const Communicator&)>& body) {
    const auto& [way, ep, tp] = GetParam();
    return run_all(way, [&, e = ep, t = tp](const Context& context) {
      const Mesh mesh(context.communicator(), {{"ep", e}, {"tp", t}});
      body(context.on(mesh.group("ep")), mesh.group("tp"));
    });
  }
};

/// What slice `slice` of expert `e` makes of x. The parts of several slices add up to other bits in another order.
float answer(float x, std::int64_t e, int slice, DType dtype) {
  constexpr float kOfSlice[] = {3e7F, -3e7F, 1.0F / 3};
  return rounded((x + 1) * static_cast<float>(e + 1) * kOfSlice[slice], dtype);
}

/// What is added to the sum, and to its norm; weights of powers of two keep products exact.
struct Beside {
  Beside(const Workload& w, const Share& share)
      : shared(DType::f32, share.x.view().shape()),
        shared_weights(DType::f32, {share.x.view().size(0)}),
        residual(share.x.view().dtype(), share.x.view().shape()),
        gain(DType::f32, {w.hidden}) {
    for (std::int64_t i = 0; i < shared.view().elements(); ++i) {
      shared.as<float>()[i] = 1.0F / static_cast<float>(3 + i % 7);
      set(residual, i, static_cast<float>(i % 5) / 8);
    }
    for (std::int64_t t = 0; t < shared_weights.view().size(0); ++t)
      shared_weights.as<float>()[t] = t % 2 ? 0.5F : 4.0F;
    for (std::int64_t h = 0; h < w.hidden; ++h) gain.as<float>()[h] = 1 + static_cast<float>(h) / 16;
  }
  Array shared, shared_weights, residual, gain;
};

/// Element (t, h) of the sum, one step after the other.
float expected(const Workload& w, const Share& share, int rank, int slices, const Beside* beside, std::int64_t t,
               std::int64_t h) {
  const DType dtype = share.x.view().dtype();
  float sum = 0;
  for (int slice = 0; slice < slices; ++slice) {
    float part = 0;
    for (std::int64_t k = 0; k < w.topk; ++k) {
      const std::int32_t e = share.ids[static_cast<std::size_t>(t * w.topk + k)];
      if (e >= 0) part += answer(w.x(rank, t, h), e, slice, dtype) * w.weight(rank, t, k);
    }
    sum += rounded(part, dtype);
  }
  const std::int64_t i = t * w.hidden + h;
  if (beside)
    sum = sum + beside->shared_weights.as<float>()[t] * beside->shared.as<float>()[i] + value(beside->residual, i);
  return rounded(sum, dtype);
}

void check_sum(const Workload& w, const Share& share, int rank, int slices, const Beside* beside, ConstTensor out) {
  for (std::int64_t t = 0; t < out.size(0); ++t) {
    for (std::int64_t h = 0; h < w.hidden; ++h)
      require_equal(value(out, t * w.hidden + h), expected(w, share, rank, slices, beside, t, h), w.name);
  }
}

TEST_P(EveryMesh, adds_up_the_parts_in_rank_order_and_then_what_is_beside_them) {
  run_mesh([](const Context& context, const Communicator& tensor) {
    for (const Workload& w : workloads(context.size())) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        const int rank = context.rank();
        Share share(w, rank, dtype);
        const Plan plan =
            make_plan(context, share.id_tensor(w), {.experts = w.experts, .first_experts = w.first_experts});
        const Inbox inbox = dispatch(context, share.x, {}, plan);
        Outbox y = make_outbox(context, plan, w.hidden, dtype);
        run_experts(inbox, y, [&](std::int64_t e, float x) { return answer(x, e, tensor.rank(), dtype); });

        const Beside beside(w, share);
        const Array normed(dtype, share.x.view().shape()), scale(DType::f32, {plan.tokens()});
        const Array again(dtype, share.x.view().shape());
        if (beside.residual.view().byte_size() > 0)  // out may be the residual
          std::memcpy(again.view().data(), beside.residual.view().data(), again.view().byte_size());
        PendingCombine plain =
            start_combine(context, plan, y, ConstTensor(share.weights), share.out, {.sum_over = tensor});
        PendingCombine full = start_combine(context, plan, y, ConstTensor(share.weights), again,
                                            {.shared = beside.shared,
                                             .shared_weights = beside.shared_weights,
                                             .residual = again,
                                             .norm = {.gain = beside.gain, .y = normed, .scale = scale},
                                             .sum_over = tensor});
        full.finish();
        plain.finish();
        check_sum(w, share, rank, tensor.size(), nullptr, share.out);
        check_sum(w, share, rank, tensor.size(), &beside, again);

        const Array wanted(dtype, normed.view().shape()), wanted_scale(DType::f32, scale.view().shape());
        rms_norm(context, again, {.gain = beside.gain, .y = wanted, .scale = wanted_scale});
        const auto same = [](const Array& a, const Array& b) {
          return a.view().byte_size() == 0 || std::memcmp(a.view().data(), b.view().data(), a.view().byte_size()) == 0;
        };
        require(same(normed, wanted) && same(scale, wanted_scale), w.name + ": the norm");
      }
    }
  });
}

TEST_P(EveryMesh, tells_every_rank_of_both_directions_what_one_did_wrong) {
  expect_success(outcomes([](const Context& context, const Communicator& tensor) {
    const std::vector<std::int32_t> ids{0, 1, 1};
    const Plan plan = make_plan(context, ConstTensor(ids.data(), {3, 1}), {.experts = 2});
    Outbox y = make_outbox(context, plan, 6, DType::f32);
    std::fill_n(y.rows().as<float>(), y.rows().elements(), 1.0F);
    const Array out(DType::f32, {3, 6}), wrong(DType::f32, {3, 7});
    const bool odd = context.rank() == context.size() - 1 && tensor.rank() == 1;
    const Error error =
        error_of([&] { combine(context, plan, y, unweighted, odd ? wrong : out, {.sum_over = tensor}); });
    require(error.code() == ErrorCode::bad_argument, error.what());
    require(error.message() == "out is f32 [3, 7], should be f32 [3, 6]", error.message());
    require_equal(error.rank(), (context.size() - 1) * tensor.size() + 1, "the rank");
    combine(context, plan, y, unweighted, out, {.sum_over = tensor});  // and all may go on
    for (int i = 0; i < 18; ++i) require_equal(out.as<float>()[i], static_cast<float>(tensor.size()), "a sum");
  }));
}

TEST_P(EveryMesh, refuses_parts_of_other_tokens_and_of_slices) {
  run_mesh([](const Context& context, const Communicator& tensor) {
    const std::vector<std::int32_t> ids{0, 1, 1};
    const std::int64_t tokens = tensor.rank() == 1 ? 2 : 3;
    const Plan plan = make_plan(context, ConstTensor(ids.data(), {tokens, 1}), {.experts = 2});
    Outbox y = make_outbox(context, plan, 6, DType::f32);
    const Array out(DType::f32, {tokens, 6});
    const Error error = error_of([&] { combine(context, plan, y, unweighted, out, {.sum_over = tensor}); });
    require(error.code() == ErrorCode::mismatch, error.what());

    const Plan replicated = make_replicated_plan(context, ConstTensor(ids.data(), {3, 1}), {.experts = 2});
    Outbox all = make_outbox(context, replicated, 6, DType::f32);
    const Error slice =
        error_of([&] { combine(context, replicated, all, unweighted, out, {.slice = true, .sum_over = tensor}); });
    require(slice.message() == "a slice of results cannot be summed over slices of experts", slice.message());
  });
}

/// Counts the bytes that a rank sends.
class Counted final : public Forwarding {
 public:
  Counted(std::unique_ptr<Transport> to, std::atomic<std::int64_t>& sent) : Forwarding(std::move(to)), sent_(sent) {}
  Ticket start(std::span<const Message> messages) override {
    for (const Message& message : messages) {
      if (message.kind == Message::Kind::send) sent_ += static_cast<std::int64_t>(message.bytes);
    }
    return Forwarding::start(messages);
  }

 private:
  std::atomic<std::int64_t>& sent_;
};

TEST(SumParts, move_what_a_ring_moves) {
  for (const std::int64_t tokens : {0, 1, 2, 7}) {
    constexpr int kRanks = 3;
    const threads::ThreadsJob job(kRanks, false);
    std::atomic<std::int64_t> sent{0};
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < kRanks; ++rank) {
      ranks.emplace_back([&, rank] {
        const Communicator communicator(std::make_unique<Counted>(job.transport(rank), sent));
        const Mesh mesh(communicator, {{"ep", 1}, {"tp", kRanks}});
        const Context whole(communicator, {.threads = 1, .backend = "reference"});
        const Context context = whole.on(mesh.group("ep"));
        const Array ids(DType::int32, {tokens, 1}), out(DType::bf16, {tokens, 5});
        const Plan plan = make_plan(context, ids, {.experts = 1});
        Outbox y = make_outbox(context, plan, 5, DType::bf16);
        std::fill_n(y.rows().as<bf16>(), y.rows().elements(), bf16(1));
        combine(context, plan, y, unweighted, out);
        barrier(whole);
        sent = 0;
        barrier(whole);
        combine(context, plan, y, unweighted, out, {.sum_over = mesh.group("tp")});
        barrier(whole);
        EXPECT_EQ(sent, 2 * (kRanks - 1) * tokens * 5 * 2) << tokens;
      });
    }
    for (std::thread& rank : ranks) rank.join();
  }
}

INSTANTIATE_TEST_SUITE_P(SumParts, EveryMesh, testing::ValuesIn(every_place()), [](const auto& test) {
  return test.param.way.name() + "_as_" + std::to_string(test.param.ep) + "x" + std::to_string(test.param.tp);
});

}  // namespace
}  // namespace expar::test
