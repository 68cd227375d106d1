// Training gives the same losses and the same held-out bits on any number of ranks and threads, to the last bit.
#include "models/trainer.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include <expar/random.h>
#include <expar/registry.h>
#include <gtest/gtest.h>

namespace expar {
namespace {

constexpr std::int64_t kSteps = 50;

TrainOptions small(DType dtype) {
  TrainOptions options;
  options.model.context = 5;
  options.model.layers = 2;
  options.model.moe.hidden = 24;
  options.model.moe.inner = 20;
  options.model.moe.router = {.experts = 5, .topk = 2, .balance = 0.01F, .z = 0.001F};
  options.model.moe.dtype = dtype;
  options.batch = 45;  // shards of 5 and 6 tokens
  options.steps = kSteps;
  options.decay_steps = kSteps;
  options.lr = 1e-2F;
  return options;
}

// Words of a small vocabulary: something to learn.
std::vector<std::uint8_t> make_words() {
  const Random random(11, "words");
  std::vector<std::uint8_t> bytes;
  for (std::uint64_t i = 0; bytes.size() < Text::kHeldOut + 3000; ++i) {
    const std::uint64_t word = random.bits(i) % 40;
    for (std::uint64_t letter = 0; letter < 2 + word % 5; ++letter) {
      bytes.push_back(static_cast<std::uint8_t>('a' + random.bits(1000 * (word + 1) + letter) % 26));
    }
    bytes.push_back(' ');
  }
  return bytes;
}

struct Outcome {
  std::vector<float> losses;
  double heldout = 0;
  double load = 0;
  std::int64_t dropped = -1;
};

/// The best backend of this build unless `backend` says otherwise.
struct Machine {
  int ranks = 1;
  int threads = 1;
  bool mapping = true;
  std::string backend = available_backends().front();
};

Outcome run(const TrainOptions& options, const Machine& machine = {}) {
  Outcome outcome;
  run_threads(machine.ranks,
              [&](const Communicator& communicator) {
                const Context context(communicator, {.threads = machine.threads, .backend = machine.backend});
                const Text text(make_words(), options.model.context, "words");
                std::int64_t steps = 0;
                const TrainReport report = train(context, text, options, [&](const Progress& p) { steps = p.step; });
                EXPECT_EQ(steps, options.steps);
                if (communicator.rank() == 0) {
                  outcome = {report.losses, report.heldout_bits_per_byte, report.load_max_over_mean, report.dropped};
                }
              },
              {.mapping = machine.mapping});
  return outcome;
}

void expect_same(const Outcome& a, const Outcome& b, const std::string& what) {
  ASSERT_EQ(a.losses.size(), b.losses.size()) << what;
  for (std::size_t step = 0; step < a.losses.size(); ++step) {
    ASSERT_EQ(std::memcmp(&a.losses[step], &b.losses[step], sizeof(float)), 0)
        << what << ", step " << step << ": " << a.losses[step] << " and " << b.losses[step];
  }
  EXPECT_EQ(std::memcmp(&a.heldout, &b.heldout, sizeof(double)), 0) << what;
  EXPECT_EQ(a.load, b.load) << what;
}

class Training : public testing::TestWithParam<DType> {};

TEST_P(Training, gives_the_same_bits_on_any_number_of_ranks) {
  const TrainOptions options = small(GetParam());
  const Outcome one = run(options);
  ASSERT_EQ(one.losses.size(), static_cast<std::size_t>(kSteps));
  for (const int ranks : {2, 3, 4, 8, 11}) {  // 11: more ranks than shards and than experts
    expect_same(one, run(options, {.ranks = ranks}), std::to_string(ranks) + " ranks");
  }
}

TEST_P(Training, gives_the_same_bits_with_two_threads_and_with_messages) {
  const TrainOptions options = small(GetParam());
  const Outcome one = run(options);
  expect_same(one, run(options, {.threads = 2}), "1 rank of 2 threads");
  expect_same(one, run(options, {.ranks = 3, .threads = 2}), "3 ranks of 2 threads");
  expect_same(one, run(options, {.ranks = 3, .mapping = false}), "3 ranks by messages");
}

TEST_P(Training, gives_the_same_bits_on_any_number_of_ranks_on_every_backend) {
  TrainOptions options = small(GetParam());
  options.steps = 10;
  for (const std::string& backend : available_backends()) {
    const Outcome one = run(options, {.backend = backend});
    for (const int ranks : {2, 3}) {
      expect_same(one, run(options, {.ranks = ranks, .backend = backend}), backend + ", " + std::to_string(ranks));
    }
  }
}

TEST_P(Training, gives_the_dense_twin_the_same_bits_too) {
  TrainOptions options = small(GetParam());
  options.model = dense_twin(options.model);
  const Outcome one = run(options);
  EXPECT_EQ(one.load, 1.0);
  for (const int ranks : {2, 4}) expect_same(one, run(options, {.ranks = ranks}), std::to_string(ranks) + " ranks");
}

TEST_P(Training, learns_and_drops_nothing) {
  const Outcome outcome = run(small(GetParam()), {.ranks = 2});
  EXPECT_FLOAT_EQ(outcome.losses.front(), std::log(256.0F));
  EXPECT_LT(outcome.losses.back(), 3.3F);
  EXPECT_LT(outcome.heldout, 3.3 / std::log(2.0));
  EXPECT_EQ(outcome.dropped, 0);
  EXPECT_GE(outcome.load, 1.0);
}

TEST_P(Training, depends_on_the_seed) {
  TrainOptions options = small(GetParam());
  options.steps = 3;
  const Outcome a = run(options);
  options.seed = 2;
  EXPECT_NE(a.losses.back(), run(options).losses.back());
}

INSTANTIATE_TEST_SUITE_P(, Training, testing::Values(DType::f32, DType::bf16),
                         [](const auto& test) { return std::string(name(test.param)); });

TEST(Schedule, warms_up_and_decays) {
  EXPECT_FLOAT_EQ(schedule(0, 1), 1.0F);
  EXPECT_FLOAT_EQ(schedule(0, 1000), 0.02F);
  EXPECT_FLOAT_EQ(schedule(49, 1000), 1.0F);
  EXPECT_NEAR(schedule(524, 1000), 0.51F, 0.001F);
  EXPECT_LT(schedule(999, 1000), 0.021F);
  EXPECT_GT(schedule(999, 1000), 0.0F);
}

TEST(TrainOptions, are_refused_with_the_value) {
  const auto message = [](auto&& change) {
    TrainOptions options = small(DType::f32);
    change(options);
    try {
      validate(options);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::bad_argument);
      return error.message();
    }
    return std::string();
  };
  EXPECT_EQ(message([](auto&) {}), "");
  EXPECT_EQ(message([](auto& o) { o.batch = 0; }), "batch 0 is not at least 1");
  EXPECT_EQ(message([](auto& o) { o.shards = 0; }), "shards 0 is not at least 1");
  EXPECT_EQ(message([](auto& o) { o.shards = 46; }), "shards 46 exceeds the batch of 45 tokens");
  EXPECT_EQ(message([](auto& o) { o.steps = -3; }), "steps -3 is not at least 1");
  EXPECT_NE(message([](auto& o) { o.lr = NAN; }), "");
  EXPECT_NE(message([](auto& o) { o.lr = 0; }), "");
}

TEST(Explosion, ends_every_rank_with_the_step_and_advice) {
  TrainOptions options = small(DType::f32);
  options.lr = 1e30F;
  try {
    run(options, {.ranks = 3});
    ADD_FAILURE() << "trained";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::bad_argument) << error.what();
    EXPECT_EQ(error.message().substr(0, 5), "step ") << error.what();
    EXPECT_NE(error.message().find("learning rate"), std::string::npos) << error.what();
  }
}

TEST(ReadText, carries_the_reason_to_every_rank) {
  for (const int ranks : {1, 3}) {
    run_threads(ranks, [](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = available_backends().front()});
      try {
        read_text(context, "/no/such/text");
        ADD_FAILURE() << "was read";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::io);
        EXPECT_EQ(error.message(), "cannot read the text '/no/such/text': No such file or directory");
      }
    });
  }
}

}  // namespace
}  // namespace expar
