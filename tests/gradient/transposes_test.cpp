// Dispatch and combine as linear maps: what one does, the other undoes and transposes. Small whole numbers, so that
// every sum is exact and equality is equality.
#include <gtest/gtest.h>

#include <array>
#include <numeric>

#include <expar/dispatch.h>
#include <expar/random.h>
#include <expar/registry.h>

#include "tests/elements.h"
#include "tests/fastest_backend.h"

namespace expar::test {
namespace {

constexpr std::int64_t kHidden = 11, kExperts = 5, kTopk = 3;
constexpr int kMostRanks = 8;

std::uint64_t key(int rank, std::int64_t i) { return static_cast<std::uint64_t>(rank * 100000 + i); }

/// Whole numbers in [-3, 3] by name, the same whoever draws them.
float number(const char* name, int rank, std::int64_t i) {
  return static_cast<float>(static_cast<int>(Random(5, name).bits(key(rank, i)) % 7) - 3);
}

Array drawn(const char* name, int rank, DType dtype, const Shape& shape) {
  Array array(dtype, shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i) set(array, i, number(name, rank, i));
  return array;
}

double dot(const ConstTensor& a, const ConstTensor& b) {
  double sum = 0;
  for (std::int64_t i = 0; i < a.elements(); ++i) sum += static_cast<double>(value(a, i)) * value(b, i);
  return sum;
}

/// One rank's tokens and where they go.
struct Rank {
  Rank(const Context& c, DType d, bool drops)
      : context(c), dtype(d), tokens(c.rank() == 1 ? 0 : 4 + 3 * c.rank()), ids(DType::int32, {tokens, kTopk}) {
    for (std::int64_t i = 0; i < ids.view().elements(); ++i) {
      const auto draw = static_cast<std::int32_t>(Random(5, "ids").bits(key(c.rank(), i)) % (kExperts + 1));
      ids.as<std::int32_t>()[i] = draw < kExperts ? draw : drops ? -1 : 0;
    }
    plan = make_plan(c, ids, {.experts = kExperts});
    x = drawn("x", c.rank(), d, {tokens, kHidden});
    out = Array(d, {tokens, kHidden});
  }

  /// The gathered rows of an inbox, [R, H], times their weights where asked.
  Outbox gathered(const Inbox& inbox, bool scaled) const {
    Outbox rows = make_outbox(context, plan, kHidden, dtype);
    Gather call;
    call.rows = inbox.expert_rows();
    call.count = plan.received();
    if (scaled) call.weights = inbox.weights().data();
    call.out = rows.rows().data();
    if (call.count > 0) context.kernels().gather(call, context.pool());
    return rows;
  }

  Context context;
  DType dtype;
  std::int64_t tokens;
  Array ids, x, out;
  Plan plan;
};

class Transposes : public testing::TestWithParam<DType> {
 protected:
  template <class Work>
  void run(int ranks, bool drops, Work work) {
    run_threads(ranks, [&](const Communicator& communicator) {
      Rank rank(Context(communicator, {.threads = 1, .backend = fastest_backend()}), GetParam(), drops);
      work(rank);
    });
  }
};
INSTANTIATE_TEST_SUITE_P(all, Transposes, testing::Values(DType::f32, DType::bf16),
                         [](const auto& test) { return std::string(name(test.param)); });

TEST_P(Transposes, copies_that_are_summed_give_k_times_the_tokens) {
  for (int ranks = 1; ranks <= kMostRanks; ++ranks) {
    run(ranks, false, [&](Rank& rank) {
      const Inbox inbox = dispatch(rank.context, rank.x, {}, rank.plan);
      Outbox copies = rank.gathered(inbox, false);
      combine(rank.context, rank.plan, copies, unweighted, rank.out);
      for (std::int64_t i = 0; i < rank.tokens * kHidden; ++i)
        ASSERT_EQ(value(rank.out, i), kTopk * value(rank.x, i)) << ranks << " ranks, element " << i;
    });
  }
}

/// <dispatch x, y> = <x, combine y>, over all ranks and with the weights that travel.
TEST_P(Transposes, dispatch_and_combine_transpose_each_other) {
  for (const bool weighted : {false, true}) {
    for (int ranks = 1; ranks <= kMostRanks; ++ranks) {
      std::array<double, kMostRanks> out{}, back{};
      run(ranks, true, [&](Rank& rank) {
        const int r = rank.context.rank();
        const Array weights = drawn("weights", r, DType::f32, {rank.tokens, kTopk});
        const Inbox inbox = dispatch(rank.context, rank.x, weights, rank.plan);
        const Outbox rows = rank.gathered(inbox, weighted);
        Outbox y = make_outbox(rank.context, rank.plan, kHidden, rank.dtype);
        for (std::int64_t i = 0; i < y.rows().elements(); ++i) set(y.rows(), i, number("y", r, i));
        out[static_cast<std::size_t>(r)] = dot(rows.rows(), y.rows());
        combine(rank.context, rank.plan, y, weighted ? std::optional<ConstTensor>(weights) : unweighted, rank.out);
        back[static_cast<std::size_t>(r)] = dot(rank.out, rank.x);
      });
      const double there = std::accumulate(out.begin(), out.end(), 0.0);
      EXPECT_EQ(there, std::accumulate(back.begin(), back.end(), 0.0)) << ranks << " ranks";
      EXPECT_NE(there, 0);
    }
  }
}

}  // namespace
}  // namespace expar::test
