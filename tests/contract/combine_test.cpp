// What combine adds to a token's slots, in which order, and how often it rounds, on every way of connecting ranks.
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <string>

#include <expar/registry.h>

#include "tests/contract/experts.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

class Combine : public EveryWay {};

constexpr std::int64_t kTokens = 6, kTopk = 3, kHidden = 5;
constexpr std::int32_t kIds[kTokens * kTopk] = {0, 1, 2, 0, 2, 1, 1, 0, 2, 1, 2, 0, 2, 0, 1, 2, 1, 0};

/// Results whose sum is another one in another order; all of them have few digits, so that bf16 holds them.
float result_of(std::int64_t expert) {
  constexpr float kOf[] = {0x1p25F, -0x1p25F, 1.25F};
  return kOf[expert];
}

/// A rank's results and all that is added to them. Weights are powers of two: products are exact.
struct Terms {
  Terms(const Context& context, DType dtype_)
      : dtype(dtype_),
        plan(make_plan(context, ConstTensor(kIds, {kTokens, kTopk}), {.experts = 3})),
        x(dtype, {kTokens, kHidden}),
        weights(DType::f32, {kTokens, kTopk}),
        shared(DType::f32, {kTokens, kHidden}),
        shared_weights(DType::f32, {kTokens}),
        residual(dtype, {kTokens, kHidden}),
        out(dtype, {kTokens, kHidden}) {
    inbox = dispatch(context, x, {}, plan);
    y = make_outbox(context, plan, kHidden, dtype);
    run_experts(inbox, y, [](std::int64_t expert, float) { return result_of(expert); });
    for (std::int64_t t = 0; t < kTokens; ++t) {
      for (std::int64_t k = 0; k < kTopk; ++k) weights.as<float>()[t * kTopk + k] = (t + k) % 2 ? 0.5F : 1.0F;
      shared_weights.as<float>()[t] = t % 2 ? 0.25F : 2.0F;
    }
    for (std::int64_t i = 0; i < kTokens * kHidden; ++i) {
      shared.as<float>()[i] = 1.0F + static_cast<float>(i % 7) / 4;
      set(residual, i, i % 2 ? 0x1p24F : -0x1p24F);
    }
  }

  /// Element i of the sum, in this order of slots and of what is beside them.
  float sum(std::int64_t i, std::array<std::int64_t, kTopk> slots, bool shared_first, bool residual_first) const {
    const std::int64_t t = i / kHidden;
    const float beside = shared_weights.as<float>()[t] * shared.as<float>()[i];
    float sum = (shared_first ? beside : 0) + (residual_first ? value(residual, i) : 0);
    for (const std::int64_t k : slots)
      sum += weights.as<float>()[t * kTopk + k] * rounded(result_of(kIds[t * kTopk + k]), dtype);
    if (!shared_first) sum += beside;
    return residual_first ? sum : sum + value(residual, i);
  }
  float expected(std::int64_t i) const { return rounded(sum(i, {0, 1, 2}, false, false), dtype); }

  DType dtype;
  Plan plan;
  Array x, weights, shared, shared_weights, residual, out;
  Inbox inbox;
  Outbox y;
};

bool same(const Array& a, const Array& b) {
  return std::memcmp(a.view().data(), b.view().data(), a.view().byte_size()) == 0;
}

void check_order(const Context& context, DType dtype) {
  Terms terms(context, dtype);
  combine(context, terms.plan, terms.y, ConstTensor(terms.weights), terms.out,
          {.shared = terms.shared, .shared_weights = terms.shared_weights, .residual = terms.residual});
  for (std::int64_t i = 0; i < kTokens * kHidden; ++i)
    require_equal(value(terms.out, i), terms.expected(i), "an element");

  combine(context, terms.plan, terms.y, ConstTensor(terms.weights), terms.residual,  // out may be the residual
          {.shared = terms.shared, .shared_weights = terms.shared_weights, .residual = terms.residual});
  require(same(terms.residual, terms.out), "out that is the residual");
}

TEST_P(Combine, adds_slots_in_order_then_what_is_shared_then_the_residual_and_rounds_once) {
  run(GetParam(), [](const Context& reference) {
    for (const std::string& backend : available_backends()) {
      const Context context(reference.communicator(), {.threads = 1, .backend = backend});
      for (const DType dtype : {DType::f32, DType::bf16}) check_order(context, dtype);
    }
    // No other order gives this, or the test could not fail.
    const Terms terms(reference, DType::f32);
    int slots = 0, shared = 0, residual = 0;
    for (std::int64_t i = 0; i < kTokens * kHidden; ++i) {
      slots += terms.sum(i, {2, 1, 0}, false, false) != terms.expected(i);
      shared += terms.sum(i, {0, 1, 2}, true, false) != terms.expected(i);
      residual += terms.sum(i, {0, 1, 2}, false, true) != terms.expected(i);
    }
    require(slots > 0 && shared > 0 && residual > 0, "sums that depend on the order");
  });
}

TEST_P(Combine, adds_what_is_shared_as_it_is_where_it_has_no_weights) {
  run(GetParam(), [](const Context& context) {
    Terms terms(context, DType::f32);
    std::fill_n(terms.shared_weights.as<float>(), kTokens, 1.0F);
    combine(context, terms.plan, terms.y, ConstTensor(terms.weights), terms.out,
            {.shared = terms.shared, .residual = terms.residual});
    for (std::int64_t i = 0; i < kTokens * kHidden; ++i)
      require_equal(terms.out.as<float>()[i], terms.expected(i), "an element");
  });
}

TEST_P(Combine, norms_the_rows_that_it_wrote) {
  run(GetParam(), [](const Context& context) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      Terms terms(context, dtype);
      Array gain(DType::f32, {kHidden}), y(dtype, {kTokens, kHidden}), scale(DType::f32, {kTokens});
      for (std::int64_t h = 0; h < kHidden; ++h) gain.as<float>()[h] = 1 + static_cast<float>(h) / 16;
      combine(context, terms.plan, terms.y, ConstTensor(terms.weights), terms.out,
              {.shared = terms.shared,
               .shared_weights = terms.shared_weights,
               .residual = terms.residual,
               .norm = {.gain = gain, .y = y, .scale = scale}});
      for (std::int64_t i = 0; i < kTokens * kHidden; ++i)
        require_equal(value(terms.out, i), terms.expected(i), "an element");
      const Array wanted(dtype, y.view().shape()), wanted_scale(DType::f32, {kTokens});
      rms_norm(context, terms.out, {.gain = gain, .y = wanted, .scale = wanted_scale});
      require(same(y, wanted) && same(scale, wanted_scale), "the norm");
    }
  });
}

TEST_P(Combine, refuses_what_does_not_fit_and_goes_on) {
  run(GetParam(), [](const Context& context) {
    Terms terms(context, DType::f32);
    const int bad = context.size() - 1;
    const Array wrong(DType::f32, {kTokens, kHidden + 1});
    const auto expect = [&](const CombineOptions& options, const std::string& wanted) {
      const Error error = error_of([&] {
        combine(context, terms.plan, terms.y, ConstTensor(terms.weights), terms.out,
                context.rank() == bad ? options : CombineOptions{});
      });
      require(error.code() == ErrorCode::bad_argument && error.message() == wanted, error.what());
      require_equal(error.rank(), context.communicator().job_rank(bad), "rank of the error");
    };
    expect({.shared = wrong}, "shared is f32 [6, 6], should be f32 [6, 5]");
    expect({.shared = terms.shared, .shared_weights = terms.weights},
           "shared_weights is f32 [6, 3], should be f32 [6]");
    expect({.residual = wrong}, "residual is f32 [6, 6], should be f32 [6, 5]");
    combine(context, terms.plan, terms.y, unweighted, terms.out);
  });
}

INSTANTIATE_TEST_SUITE_P(Ways, Combine, testing::ValuesIn(every_way()), way_name);

}  // namespace
}  // namespace expar::test
