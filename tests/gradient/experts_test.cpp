// The experts' backward pass, through dispatch and combine, against finite differences.
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include <expar/experts.h>
#include <expar/random.h>
#include <expar/registry.h>

#include "tests/error_of.h"
#include "tests/fastest_backend.h"
#include "tests/gradient/differences.h"

namespace expar::test {
namespace {

constexpr int kRanks = 2;
constexpr std::int64_t kTokens[kRanks] = {4, 3};
constexpr std::int64_t kFirst[kRanks] = {0, 4};  // global number of a rank's first token
constexpr std::int64_t kAll = 7, kExperts = 3, kTopk = 2, kHidden = 6, kInner = 5;
// Expert 1 gets nothing, expert 2 the same token twice, and one slot is not routed.
constexpr std::int32_t kIds[kAll * kTopk] = {0, 2, 2, 2, 0, -1, 2, 0, 0, 2, 2, 0, 2, 0};

/// Everything that is differentiated, in one array.
struct Numbers {
  explicit Numbers(const ExpertShape& shape) {
    const auto add = [&](const char* name, std::int64_t count) {
      names.push_back(name);
      begins.push_back(static_cast<std::int64_t>(values.size()));
      const Random random(11, name);
      for (std::int64_t i = 0; i < count; ++i) values.push_back(0.6F * random.normal(static_cast<std::uint64_t>(i)));
    };
    add("x", kAll * kHidden);
    add("weights", kAll * kTopk);
    add("up", kExperts * shape.up_rows() * kHidden);
    add("down", kExperts * kHidden * kInner);
    add("up_bias", shape.bias ? kExperts * shape.up_rows() : 0);
    add("down_bias", shape.bias ? kExperts * kHidden : 0);
    begins.push_back(static_cast<std::int64_t>(values.size()));
    const Random random(11, "dout");
    for (std::int64_t i = 0; i < kAll * kHidden; ++i) dout.push_back(random.normal(static_cast<std::uint64_t>(i)));
  }
  float* at(std::size_t section, std::int64_t index = 0) { return values.data() + begins[section] + index; }

  std::vector<const char*> names;
  std::vector<std::int64_t> begins;
  std::vector<float> values, dout;
};
enum Section : std::size_t { kX, kWeights, kUp, kDown, kUpBias, kDownBias };

/// One rank's part of the function and of its gradient.
class Rank {
 public:
  Rank(const Context& context, const ExpertShape& shape, Numbers& numbers)
      : context_(context), shape_(shape), numbers_(numbers), tokens_(kTokens[context.rank()]) {
    const std::int64_t first = kFirst[context.rank()];
    plan_ = make_plan(context, ConstTensor(kIds + first * kTopk, {tokens_, kTopk}), {.experts = kExperts});
    x_ = Tensor(numbers.at(kX, first * kHidden), {tokens_, kHidden});
    weights_ = Tensor(numbers.at(kWeights, first * kTopk), {tokens_, kTopk});
    out_ = Array(DType::f32, {tokens_, kHidden});
    dout_ = ConstTensor(numbers.dout.data() + first * kHidden, {tokens_, kHidden});
  }

  /// This rank's part of sum(out * dout).
  double loss() {
    forward();
    double sum = 0;
    for (std::int64_t i = 0; i < tokens_ * kHidden; ++i)
      sum += static_cast<double>(out_.as<float>()[i]) * dout_.as<float>()[i];
    return sum;
  }

  void gradient(Numbers& gradients) {
    forward();
    const std::int64_t e = plan_.local().first;
    const std::int64_t local = plan_.local().count;
    const std::int64_t wide = shape_.up_rows();
    ExpertGradients g;
    g.up = Tensor(gradients.at(kUp, e * wide * kHidden), {local, wide, kHidden});
    g.down = Tensor(gradients.at(kDown, e * kHidden * kInner), {local, kHidden, kInner});
    if (shape_.bias) {
      g.up_bias = Tensor(gradients.at(kUpBias, e * wide), {local, wide});
      g.down_bias = Tensor(gradients.at(kDownBias, e * kHidden), {local, kHidden});
    }
    const Inbox dout = dispatch(context_, dout_, {}, plan_, {.lists_of = &inbox_});
    Outbox dx = make_outbox(context_, plan_, kHidden, DType::f32);
    Outbox dweights = make_outbox(context_, plan_, 1, DType::f32);
    ExpertsScratch scratch;
    experts_backward(context_, shape_, weights(), inbox_, dout, y_, record_, g, &dx, dweights, scratch);
    const std::int64_t first = kFirst[context_.rank()];
    combine(context_, plan_, dx, unweighted, Tensor(gradients.at(kX, first * kHidden), {tokens_, kHidden}));
    fetch_slots(context_, plan_, dweights, Tensor(gradients.at(kWeights, first * kTopk), {tokens_, kTopk, 1}));
  }

 private:
  ExpertWeights weights() {
    const std::int64_t e = plan_.local().first;
    const std::int64_t local = plan_.local().count;
    const std::int64_t wide = shape_.up_rows();
    ExpertWeights w;
    w.up = {numbers_.at(kUp, e * wide * kHidden), DType::f32, false};
    w.down = {numbers_.at(kDown, e * kHidden * kInner), DType::f32, false};
    if (shape_.bias) {
      w.up_bias = ConstTensor(numbers_.at(kUpBias, e * wide), {local, wide});
      w.down_bias = ConstTensor(numbers_.at(kDownBias, e * kHidden), {local, kHidden});
    }
    return w;
  }
  void forward() {
    inbox_ = dispatch(context_, x_, weights_, plan_);
    y_ = make_outbox(context_, plan_, kHidden, DType::f32);
    experts_forward(context_, shape_, weights(), inbox_, y_, record_);
    std::optional<ConstTensor> by_slot = unweighted;
    if (shape_.weights_on == WeightsOn::output) by_slot = weights_;
    combine(context_, plan_, y_, by_slot, out_);
  }

  Context context_;
  ExpertShape shape_;
  Numbers& numbers_;
  std::int64_t tokens_;
  Plan plan_;
  Tensor x_, weights_;
  Array out_;
  ConstTensor dout_;
  Inbox inbox_;
  Outbox y_;
  ExpertsRecord record_;
};

class ExpertsGradient : public testing::TestWithParam<NamedActivation> {};
INSTANTIATE_TEST_SUITE_P(all, ExpertsGradient, testing::ValuesIn(kActivations),
                         [](const auto& test) { return std::string(test.param.name); });

void check(const ExpertShape& shape) {
  constexpr double kStep = 0.02;
  const Numbers numbers(shape);
  Numbers gradients(shape);
  std::vector<double> losses[kRanks];  // of each point of each element
  run_threads(kRanks, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    Numbers own(shape);  // each rank moves its own copy: they need not wait for each other
    Rank rank(context, shape, own);
    rank.gradient(gradients);
    for (float& element : own.values) {
      const float before = element;
      for (const double at : Stencil::kAt) {
        element = static_cast<float>(before + at * kStep);
        losses[context.rank()].push_back(rank.loss());
      }
      element = before;
    }
  });
  for (std::size_t s = 0; s < numbers.names.size(); ++s) {
    std::vector<double> differences;
    for (std::int64_t i = numbers.begins[s]; i < numbers.begins[s + 1]; ++i) {
      double sum = 0;
      for (int p = 0; p < Stencil::kPoints; ++p) {
        const auto at = static_cast<std::size_t>(i * Stencil::kPoints + p);
        sum += Stencil::kWeight[p] * (losses[0][at] + losses[1][at]);
      }
      differences.push_back(sum / kStep);
    }
    if (!differences.empty()) expect_gradient(numbers.names[s], differences, gradients.at(s), 1e-3);
  }
}

ExpertShape shape_of(const NamedActivation& named, WeightsOn on, bool bias) {
  return {.hidden = kHidden,
          .inner = kInner,
          .activation = named.activation,
          .numbers = named.numbers,
          .bias = bias,
          .weights_on = on};
}

TEST_P(ExpertsGradient, agrees_with_finite_differences) { check(shape_of(GetParam(), WeightsOn::output, true)); }

TEST(ExpertsGradients, agree_with_finite_differences_without_biases) {
  check(shape_of(kActivations[0], WeightsOn::output, false));
}

TEST(ExpertsGradients, agree_with_finite_differences_wherever_the_weights_count) {
  for (const WeightsOn on : {WeightsOn::inner, WeightsOn::input}) {
    for (const bool bias : {false, true}) check(shape_of(kActivations[0], on, bias));
  }
}

/// Matrices of zeros leave the biases alone: of each row, whatever it is, remains down_bias; and with a down of ones,
/// the sum over act(up_bias) as well.
TEST(Experts, add_both_their_biases) {
  for (const WeightsOn on : {WeightsOn::output, WeightsOn::inner, WeightsOn::input}) {
    ExpertShape shape = shape_of(kActivations[0], on, true);
    shape.activation = Activation::relu2;
    run_threads(1, [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
      const Plan plan = make_plan(context, ConstTensor(kIds, {kAll, kTopk}), {.experts = kExperts});
      const Array x(DType::f32, {kAll, kHidden}), up(DType::f32, {kExperts, kInner, kHidden});
      const Array down(DType::f32, {kExperts, kHidden, kInner});
      const Array up_bias(DType::f32, {kExperts, kInner}), down_bias(DType::f32, {kExperts, kHidden});
      std::fill_n(x.as<float>(), kAll * kHidden, 3.0F);
      std::fill_n(down.as<float>(), kExperts * kHidden * kInner, 1.0F);
      for (std::int64_t i = 0; i < kExperts * kInner; ++i) up_bias.as<float>()[i] = static_cast<float>(i / kInner + 1);
      for (std::int64_t i = 0; i < kExperts * kHidden; ++i) down_bias.as<float>()[i] = static_cast<float>(i);
      ExpertWeights weights;
      weights.up = {up.view().data(), DType::f32, false};
      weights.down = {down.view().data(), DType::f32, false};
      weights.up_bias = up_bias;
      weights.down_bias = down_bias;
      const Inbox inbox = dispatch(context, x, {}, plan);  // every weight is 1
      Outbox y = make_outbox(context, plan, kHidden, DType::f32);
      ExpertsRecord record;
      experts_forward(context, shape, weights, inbox, y, record);
      for (std::int64_t e = 0; e < kExperts; ++e) {
        for (std::int64_t row = plan.offsets()[static_cast<std::size_t>(e)];
             row < plan.offsets()[static_cast<std::size_t>(e) + 1]; ++row) {
          for (std::int64_t h = 0; h < kHidden; ++h) {
            const auto sum = static_cast<float>(kInner * (e + 1) * (e + 1) + e * kHidden + h);
            EXPECT_EQ(y.rows().as<float>()[row * kHidden + h], sum) << "expert " << e << ", column " << h;
          }
        }
      }
    });
  }
}

TEST(Experts, refuse_rows_that_are_not_theirs) {
  const ExpertShape shape = shape_of(kActivations[0], WeightsOn::output, false);
  Numbers numbers(shape);
  run_threads(1, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    ExpertWeights weights;
    weights.up = {numbers.at(kUp), DType::f32, false};
    weights.down = {numbers.at(kDown), DType::f32, false};
    const auto refusal = [&](const Array& x, std::int64_t alignment) {
      const Plan plan =
          make_plan(context, ConstTensor(kIds, {kAll, kTopk}), {.experts = kExperts, .alignment = alignment});
      const Inbox inbox = dispatch(context, x, {}, plan);
      Outbox y = make_outbox(context, plan, kHidden, DType::f32);
      ExpertsRecord record;
      return refusal_of([&] { experts_forward(context, shape, weights, inbox, y, record); });
    };
    const Array x(DType::f32, {kAll, kHidden}), wide(DType::f32, {kAll, kHidden + 1}),
        low(DType::bf16, {kAll, kHidden});
    EXPECT_EQ(refusal(wide, 1), "hidden of the inbox is 7, of the experts 6");
    EXPECT_EQ(refusal(low, 1), "dtype of the inbox is bf16, of the experts f32");
    EXPECT_EQ(refusal(x, 4), "the experts take plans of alignment 1: local expert 0 has 6 rows in room for 8");
  });
}

}  // namespace
}  // namespace expar::test
