// The router's losses against plain loops in double, on any number of ranks.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include <expar/random.h>
#include <expar/router.h>

#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

constexpr std::int64_t kTokens = 40, kExperts = 6, kTopk = 2;
constexpr int kRanks[] = {1, 2, 3, 4, 7, 8};
const std::vector<std::int64_t> kSequences{0, 7, 7, 19, 20, 31, 40};  // of the global batch; one is empty
const std::vector<std::int64_t> kSoFar{30, 0, 10, 20, 0, 0};          // slots of 30 tokens before

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

RouterOptions all_losses() {
  RouterOptions options{.experts = kExperts, .topk = kTopk};
  options.balance = 0.5F;
  options.z = 0.25F;
  options.sequence_balance = 2.0F;
  options.importance = 0.125F;
  options.importance_cv = 3.0F;
  options.load = 1.5F;
  options.load_deviation = 0.05F;
  return options;
}

std::vector<float> drawn_logits() {
  const Random random(5, "losses");
  std::vector<float> logits;
  for (std::int64_t i = 0; i < kTokens * kExperts; ++i)
    logits.push_back(1.5F * random.normal(static_cast<std::uint64_t>(i)) + (i % kExperts == 2 ? 1.0F : 0.0F));
  return logits;
}

/// Every fifth token is padding, and so is all of the sequence from 19 to 20.
std::vector<std::int8_t> drawn_mask() {
  std::vector<std::int8_t> mask;
  for (std::int64_t t = 0; t < kTokens; ++t) mask.push_back(t % 5 != 4);
  return mask;
}

struct Expected {
  double balance = 0, sequence_balance = 0, importance = 0, importance_cv = 0, load = 0, z = 0;
};

/// Unbiased variance over the squared mean.
double variation(const std::vector<double>& v, double* variance = nullptr) {
  double mean = 0, sum = 0;
  for (const double x : v) mean += x / static_cast<double>(v.size());
  for (const double x : v) sum += (x - mean) * (x - mean) / static_cast<double>(v.size() - 1);
  if (variance != nullptr) *variance = sum;
  return sum / (mean * mean);
}

/// All of it by its formulas, token by token. `mask` may be empty.
Expected expected_losses(const RouterOptions& options, const std::vector<float>& logits,
                         const std::vector<std::int8_t>& mask, bool accumulated) {
  std::vector<double> importance(kExperts), load(kExperts), counts(kExperts);
  Expected expected;
  double tokens = 0, squares = 0, sequences = 0;
  for (std::size_t s = 0; s + 1 < kSequences.size(); ++s) {
    std::vector<double> mean(kExperts), count(kExperts);
    double length = 0;
    for (std::int64_t t = kSequences[s]; t < kSequences[s + 1]; ++t) {
      if (!mask.empty() && mask[at(t)] == 0) continue;
      ++length;
      std::vector<double> p;
      double total = 0;
      for (std::int64_t e = 0; e < kExperts; ++e) total += std::exp(double{logits[at(t * kExperts + e)]});
      for (std::int64_t e = 0; e < kExperts; ++e) p.push_back(std::exp(double{logits[at(t * kExperts + e)]}) / total);
      squares += std::log(total) * std::log(total);
      std::vector<double> sorted = p;
      std::sort(sorted.rbegin(), sorted.rend());
      for (std::size_t e = 0; e < p.size(); ++e) {
        count[e] += p[e] >= sorted[kTopk - 1];
        mean[e] += p[e];
        importance[e] += p[e];
        const double distance = (p[e] - sorted[kTopk - 1]) / double{options.load_deviation};
        load[e] += 0.5 * (1 + std::erf(distance / std::sqrt(2.0)));
      }
    }
    for (std::size_t e = 0; e < kExperts; ++e) counts[e] += count[e];
    tokens += length;
    if (length == 0) continue;
    ++sequences;
    for (std::size_t e = 0; e < kExperts; ++e)
      expected.sequence_balance += kExperts / (kTopk * length) * count[e] * mean[e] / length;
  }
  expected.sequence_balance *= double{options.sequence_balance} / sequences;
  const double all = tokens + (accumulated ? 30 : 0);
  for (std::size_t e = 0; e < kExperts; ++e) {
    const double slots = counts[e] + static_cast<double>(accumulated ? kSoFar[e] : 0);
    expected.balance += double{options.balance} * kExperts * slots / (all * kTopk) * importance[e] / tokens;
  }
  double variance = 0;
  expected.importance_cv = double{options.importance_cv} * variation(importance, &variance);
  expected.importance = double{options.importance} * variance / (kExperts * kExperts);
  expected.load = double{options.load} * variation(load);
  expected.z = double{options.z} * squares / tokens;
  return expected;
}

/// The losses of a batch of which rank r holds some sequences whole: none on rank 1 of several.
RouterLosses losses_of(const Context& context, const RouterOptions& options, const std::vector<float>& logits,
                       const std::vector<std::int8_t>& mask, bool accumulated) {
  const auto begin_of = [&](int rank) {
    if (rank == 2 && context.size() > 2) rank = 1;
    return (kSequences.size() - 1) * at(rank) / at(context.size());
  };
  const std::size_t begin = begin_of(context.rank());
  const std::size_t end = begin_of(context.rank() + 1);
  std::vector<std::int64_t> sequences;
  for (std::size_t s = begin; s <= end; ++s) sequences.push_back(kSequences[s] - kSequences[begin]);
  const std::int64_t tokens = sequences.back();

  // Everybody knows the counts of the whole batch, as from a plan.
  Routing whole, routing;
  RouteInputs inputs;
  if (!mask.empty()) inputs.mask = ConstTensor(mask.data(), {kTokens});
  route(context, options, ConstTensor(logits.data(), {kTokens, kExperts}), whole, inputs);
  std::vector<std::int64_t> counts(kExperts);
  for (std::int64_t i = 0; i < kTokens * kTopk; ++i)
    if (whole.ids.as<std::int32_t>()[i] >= 0) ++counts[at(whole.ids.as<std::int32_t>()[i])];
  if (!mask.empty()) inputs.mask = ConstTensor(mask.data() + kSequences[begin], {tokens});
  route(context, options, ConstTensor(logits.data() + kSequences[begin] * kExperts, {tokens, kExperts}), routing,
        inputs);
  LossInputs more;
  if (accumulated) more.counts_so_far = kSoFar, more.tokens_so_far = 30;
  return router_losses(context, options, routing, counts, sequences, more);
}

void expect_near(const RouterLosses& got, const Expected& want) {
  EXPECT_NEAR(got.balance, want.balance, 1e-6 * want.balance);
  EXPECT_NEAR(got.sequence_balance, want.sequence_balance, 1e-6 * want.sequence_balance);
  EXPECT_NEAR(got.importance, want.importance, 1e-5 * want.importance);
  EXPECT_NEAR(got.importance_cv, want.importance_cv, 1e-5 * want.importance_cv);
  EXPECT_NEAR(got.load, want.load, 1e-5 * want.load);
  EXPECT_NEAR(got.z, want.z, 1e-6 * want.z);
}

void compare(const std::vector<std::int8_t>& mask, bool accumulated) {
  const RouterOptions options = all_losses();
  const std::vector<float> logits = drawn_logits();
  const Expected want = expected_losses(options, logits, mask, accumulated);
  RouterLosses alone;
  for (const int ranks : kRanks) {
    expect_success(run_communicators({.ranks = ranks}, [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = "reference"});
      const RouterLosses got = losses_of(context, options, logits, mask, accumulated);
      expect_near(got, want);
      if (ranks == 1) {
        alone = got;
        return;
      }
      const float a[] = {alone.balance, alone.sequence_balance, alone.importance, alone.importance_cv, alone.load,
                         alone.z,       alone.dlogsumexp};
      const float b[] = {got.balance, got.sequence_balance, got.importance, got.importance_cv, got.load,
                         got.z,       got.dlogsumexp};
      EXPECT_EQ(std::memcmp(a, b, sizeof a), 0) << ranks << " ranks";
      // Each token has a row of its own, because of the load loss: this rank's are among those of one rank.
      EXPECT_EQ(got.segments.size(), got.dscores.size() / kExperts + 1);
      if (context.rank() == ranks - 1 && !got.dscores.empty()) {
        const auto* tail = alone.dscores.data() + alone.dscores.size() - got.dscores.size();
        EXPECT_EQ(std::memcmp(tail, got.dscores.data(), got.dscores.size() * sizeof(float)), 0) << ranks << " ranks";
      }
    }));
  }
}

TEST(RouterLosses, are_on_any_ranks_what_plain_loops_say) { compare({}, false); }
TEST(RouterLosses, leave_out_padding) { compare(drawn_mask(), false); }
TEST(RouterLosses, count_the_slots_of_earlier_micro_batches) { compare({}, true); }

/// Token t goes to experts t and t + 1, with the least preference that f32 can tell.
TEST(RouterLosses, are_on_the_scale_that_they_state) {
  RouterOptions options = all_losses();
  options.load_deviation = 10.0F;
  std::vector<float> logits(kTokens * kExperts);
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (std::int64_t k = 0; k < kTopk; ++k) logits[at(t * kExperts + (t + k) % kExperts)] = 1e-6F;
  expect_success(run_communicators({.ranks = 1}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = "reference"});
    const RouterLosses losses = losses_of(context, options, logits, {}, false);
    EXPECT_NEAR(losses.balance, options.balance, 1e-5);
    EXPECT_NEAR(losses.sequence_balance, options.sequence_balance, 1e-5);
    EXPECT_NEAR(losses.importance, 0, 1e-6);
    EXPECT_NEAR(losses.importance_cv, 0, 1e-6);
    EXPECT_NEAR(losses.load, 0, 1e-6);
    EXPECT_NEAR(losses.z, options.z * std::pow(std::log(double{kExperts}), 2), 1e-4);
  }));
}

/// transformers' load_balancing_loss_func: the fractions of each of the K slots, all added up.
TEST(RouterLosses, convert_the_coefficient_of_hugging_face) {
  const std::vector<float> logits = drawn_logits();
  const float coefficient = 0.02F;
  double theirs = 0;
  std::vector<double> chosen(kExperts), mean(kExperts);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const float* row = logits.data() + t * kExperts;
    double total = 0;
    for (std::int64_t e = 0; e < kExperts; ++e) total += std::exp(double{row[e]});
    for (std::int64_t e = 0; e < kExperts; ++e) {
      mean[at(e)] += std::exp(double{row[e]}) / total / kTokens;
      chosen[at(e)] += std::count_if(row, row + kExperts, [&](float other) { return other > row[e]; }) < kTopk;
    }
  }
  for (std::size_t e = 0; e < kExperts; ++e) theirs += double{coefficient} * kExperts * chosen[e] / kTokens * mean[e];
  RouterOptions options{.experts = kExperts, .topk = kTopk};
  options.balance = balance_from_hugging_face(coefficient, kTopk);
  expect_success(run_communicators({.ranks = 1}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = "reference"});
    EXPECT_NEAR(losses_of(context, options, logits, {}, false).balance, theirs, 1e-7);
  }));
}

/// All logits are alike, so that each token adds log(E)^2 to the z-loss, and its mean is that if all are counted.
TEST(RouterLosses, count_every_token_of_a_large_batch) {
  RouterOptions options{.experts = 4, .topk = 1};
  options.z = 1;
  for (const int ranks : {1, 3, 8}) {
    for (const std::int64_t tokens : {1023, 1024, 1025, 2500}) {  // of rank 0; each other has seven more
      expect_success(run_communicators({.ranks = ranks}, [&](const Communicator& communicator) {
        const Context context(communicator, {.threads = 1, .backend = "reference"});
        const Array logits(DType::f32, {tokens + 7 * context.rank(), 4});
        Routing routing;
        route(context, options, logits, routing);
        const std::int64_t all = tokens * ranks + 7 * ranks * (ranks - 1) / 2;
        const std::vector<std::int64_t> counts{all, 0, 0, 0}, shards{0, 10, logits.view().size(0)};
        const RouterLosses losses = router_losses(context, options, routing, counts, shards);
        EXPECT_EQ(losses.tokens, all) << ranks << " ranks";
        EXPECT_NEAR(losses.z, std::pow(std::log(4.0), 2), 1e-4) << ranks << " ranks";
        EXPECT_EQ(losses.load_fraction[0], 1.0F);
      }));
    }
  }
}

TEST(RouterLosses, refuse_what_cannot_be) {
  expect_success(run_communicators({.ranks = 2}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = "reference"});
    const RouterOptions options{.experts = 2, .topk = 1};
    const Array logits(DType::f32, {3, 2});
    Routing routing;
    route(context, options, logits, routing);
    const std::vector<std::int64_t> counts{6, 0}, shards{0, 3}, wrong{0, 2}, three{1, 2, 3};
    const auto message = [&](const RouterOptions& o, const LossInputs& inputs) -> std::string {
      try {
        router_losses(context, o, routing, counts, shards, context.rank() == 1 ? inputs : LossInputs{});
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::bad_argument);
        return error.message();
      }
      return "";
    };
    EXPECT_EQ(message(options, {.sequences = wrong}),
              "sequences are [0, 2], should ascend from 0 to the 3 tokens of this rank");
    EXPECT_EQ(message(options, {.counts_so_far = three}), "counts_so_far has 3 entries for 2 experts");
    EXPECT_EQ(message(options, {.tokens_so_far = 4}), "tokens_so_far is 4, must go with the counts_so_far");
    RouterOptions load = options;
    load.load = 1;
    EXPECT_EQ(message(load, {}), "the load loss needs a load_deviation above 0");
    EXPECT_EQ(message(options, {}), "");
  }));
}

}  // namespace
}  // namespace expar::test
