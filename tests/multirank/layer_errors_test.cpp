// What one rank does wrong reaches all of them as one sentence, and the layer works afterwards.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include <expar/collectives.h>

#include "tests/fastest_backend.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

constexpr int kRanks = 3;
constexpr int kWrong = 2;  // the rank that makes the mistake

/// Runs `work`, which must fail on this rank with these words of rank `rank`.
template <class Work>
void expect_error(ErrorCode code, int rank, const std::string& words, Work work) {
  try {
    work();
    ADD_FAILURE() << "no error, should be: " << words;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_EQ(error.rank(), rank) << error.what();
    EXPECT_NE(error.message().find(words), std::string::npos) << error.what();
  }
}

/// One rank's buffers of a right call, of which a test makes a wrong one.
struct Call {
  Call(const LayerCase& c, const Context& context) : held(c.held(context.rank(), context.size())) {
    x = rows_of(c, c.x, held);
    residual = rows_of(c, c.residual, held);
    dout = rows_of(c, c.dout, held);
    out = Array(c.spec.dtype, x.view().shape());
    dx = Array(c.spec.dtype, x.view().shape());
    for (std::size_t s = 0; s <= held.count; ++s) shards.push_back(c.shards[held.first + s] - c.shards[held.first]);
  }
  LayerCase::Held held;
  Array x, residual, dout, out, dx;
  std::vector<std::int64_t> shards;
  MoeRecord record;
};

/// Lets rank kWrong make a mistake in one call, then checks that the next right step gives the right bytes.
template <class Mistake>
void check(const std::string& words, Mistake mistake, const LayerSpec& spec = {.experts = 8, .topk = 2, .bias = true}) {
  const LayerCase c(spec);
  LayerResult result(c);
  LayerResult wanted(c);
  expect_success(run_communicators({.ranks = kRanks}, [&](const Communicator& communicator) {
    run_layer(c, Context(communicator, {.threads = 1, .backend = fastest_backend()}), wanted);
  }));
  expect_success(run_communicators({.ranks = kRanks}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    MoeLayer layer(context, c.options());
    c.fill(layer);
    Call call(c, context);
    expect_error(ErrorCode::bad_argument, kWrong, words, [&] { mistake(layer, context, call); });

    Call right(c, context);
    layer.forward(context, right.x, right.out, right.residual, right.shards, right.record);
    layer.backward(context, right.record, right.dout, right.dx);
    const std::int64_t row = c.shards[right.held.first] * c.spec.hidden;
    to_f32(right.out, result.at("out") + row);
    to_f32(right.dx, result.at("dx") + row);
  }));
  for (std::size_t i = 0; i < c.x.size(); ++i) {
    ASSERT_EQ(result.at("out")[i], wanted.at("out")[i]) << words << ": out[" << i << "]";
    ASSERT_EQ(result.at("dx")[i], wanted.at("dx")[i]) << words << ": dx[" << i << "]";
  }
}

void train(MoeLayer& layer, const Context& context, Call& call) {
  layer.forward(context, call.x, call.out, call.residual, call.shards, call.record);
}

TEST(LayerErrors, tell_every_rank_of_a_nan_in_one_token) {
  check("logits[1,0] is nan", [](MoeLayer& layer, const Context& context, Call& call) {
    if (context.rank() == kWrong) call.x.as<float>()[1 * 35 + 4] = std::numeric_limits<float>::quiet_NaN();
    layer.forward(context, call.x, call.out, call.residual);
  });
}

TEST(LayerErrors, tell_every_rank_of_an_infinite_logit_in_training) {
  check("logits[0,0] is ", [](MoeLayer& layer, const Context& context, Call& call) {
    if (context.rank() == kWrong) call.x.as<float>()[7] = std::numeric_limits<float>::infinity();
    train(layer, context, call);
  });
}

TEST(LayerErrors, tell_every_rank_of_a_wrong_shape_of_out) {
  check("out is f32 [34, 36], should be f32 [34, 35]", [](MoeLayer& layer, const Context& context, Call& call) {
    if (context.rank() == kWrong) call.out = Array(DType::f32, {call.x.view().size(0), 36});
    train(layer, context, call);
  });
}

TEST(LayerErrors, tell_every_rank_of_a_wrong_shape_in_decoding) {
  check("residual is f32 [34, 36], should be f32 [34, 35]",
        [](MoeLayer& layer, const Context& context, Call& call) {
          const Array wide(DType::f32, {call.x.view().size(0), 36});
          layer.forward(context, call.x, call.out, context.rank() == kWrong ? wide : call.residual);
        },
        {.experts = 8, .topk = 2, .shared_inner = 21, .bound = 64});
}

TEST(LayerErrors, tell_every_rank_of_a_wrong_dtype_of_x) {
  check("x is bf16", [](MoeLayer& layer, const Context& context, Call& call) {
    if (context.rank() == kWrong) call.x = Array(DType::bf16, call.x.view().shape());
    layer.forward(context, call.x, call.out);
  });
}

TEST(LayerErrors, tell_every_rank_of_wrong_shards) {
  check("shards are [0, 5], should ascend from 0 to the 34 tokens",
        [](MoeLayer& layer, const Context& context, Call& call) {
          if (context.rank() == kWrong) call.shards = {0, 5};
          train(layer, context, call);
        });
}

TEST(LayerErrors, tell_every_rank_that_out_is_x) {
  check("out must not be x", [](MoeLayer& layer, const Context& context, Call& call) {
    const Tensor out = context.rank() == kWrong ? call.x : call.out;
    layer.forward(context, call.x, out, call.residual, call.shards, call.record);
  });
}

TEST(LayerErrors, tell_every_rank_of_a_wrong_gradient) {
  check("dout is f32 [1, 35], should be f32 [34, 35]", [](MoeLayer& layer, const Context& context, Call& call) {
    train(layer, context, call);
    if (context.rank() == kWrong) call.dout = Array(DType::f32, {1, 35});
    layer.backward(context, call.record, call.dout, call.dx);
  });
}

TEST(LayerErrors, tell_every_rank_of_a_backward_pass_without_a_forward_pass) {
  check("the record holds no forward pass for training", [](MoeLayer& layer, const Context& context, Call& call) {
    train(layer, context, call);
    MoeRecord empty;
    layer.backward(context, context.rank() == kWrong ? empty : call.record, call.dout, call.dx);
  });
}

TEST(LayerErrors, tell_every_rank_of_wrong_room_for_dx) {
  check("dx is f32 [34, 1], should be f32 [34, 35]", [](MoeLayer& layer, const Context& context, Call& call) {
    train(layer, context, call);
    if (context.rank() == kWrong) call.dx = Array(DType::f32, {34, 1});
    layer.backward(context, call.record, call.dout, call.dx);
  });
}

TEST(LayerErrors, tell_every_rank_of_an_expert_that_is_given_too_much) {
  LayerCase c({.experts = 8, .topk = 2, .hot = 3});
  c.spec.capacity = {.policy = CapacityPolicy::error, .rows = 36};  // of 37 tokens
  expect_success(run_communicators({.ranks = kRanks}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    MoeLayer layer(context, c.options());
    c.fill(layer);
    Call call(c, context);
    expect_error(ErrorCode::bad_argument, -1, "expert 3 is given 37 rows, its capacity is 36",
                 [&] { train(layer, context, call); });
    expect_error(ErrorCode::bad_argument, 0, "the record holds no forward pass",
                 [&] { layer.backward(context, call.record, call.dout, call.dx); });
    if (context.rank() == 0) call.x.as<float>()[0] = -1;  // the first token goes elsewhere
    train(layer, context, call);
    layer.backward(context, call.record, call.dout, call.dx);
  }));
}

/// Options that no layer can have, on every rank.
void refuse(const std::string& words, const MoeLayerOptions& options) {
  expect_success(run_communicators({.ranks = kRanks}, [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    expect_error(ErrorCode::bad_argument, 0, words, [&] { MoeLayer layer(context, options); });
    barrier(context);
  }));
}

TEST(LayerErrors, name_the_option_that_is_wrong) {
  const MoeLayerOptions right = LayerCase({}).options();
  const auto with = [&](auto change) {
    MoeLayerOptions options = right;
    change(options);
    return options;
  };
  refuse("topk 9 is above experts 8", with([](auto& o) { o.router.topk = 9; }));
  refuse("topk is 0, must be at least 1", with([](auto& o) { o.router.topk = 0; }));
  refuse("experts is 0, must be at least 1", with([](auto& o) { o.router.experts = 0; }));
  refuse("hidden is -1, must be at least 1", with([](auto& o) { o.hidden = -1; }));
  refuse("inner is 0, must be at least 1", with([](auto& o) { o.inner = 0; }));
  refuse("alpha is inf, must be a number", with([](auto& o) { o.numbers.alpha = INFINITY; }));
  refuse("limit is -1.000000, must be above 0", with([](auto& o) { o.numbers.limit = -1; }));
  refuse("offset is nan, must be a number", with([](auto& o) { o.numbers.offset = std::nanf(""); }));
  refuse("shared_inner is -5, must be at least 0", with([](auto& o) { o.shared_inner = -5; }));
  refuse("0 zero, -1 copy and 0 constant experts of 8", with([](auto& o) { o.special.copy = -1; }));
  refuse("8 zero, 0 copy and 0 constant experts of 8", with([](auto& o) { o.special.zero = 8; }));
  refuse("shared_gate asks for shared experts", with([](auto& o) { o.shared_gate = true; }));
  refuse("f32 or bf16, not int8", with([](auto& o) { o.dtype = DType::int8; }));
  refuse("balance is -1", with([](auto& o) { o.router.balance = -1.0F; }));
  refuse("a capacity policy needs a factor or rows",
         with([](auto& o) { o.capacity.policy = CapacityPolicy::drop_by_score; }));
  refuse("its capacity cannot have the policy overflow",
         with([](auto& o) { o.capacity = {.policy = CapacityPolicy::overflow, .rows = 1}; }));
  refuse("z is nan", with([](auto& o) { o.router.z = std::nanf(""); }));
}

TEST(LayerErrors, tell_every_rank_that_layers_differ) {
  for (const bool in_signature : {true, false}) {
    expect_success(run_communicators({.ranks = kRanks}, [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
      MoeLayerOptions options = LayerCase({}).options();
      if (context.rank() == kWrong) (in_signature ? options.inner = 20 : options.router.balance = 0.25F);
      expect_error(ErrorCode::mismatch, kWrong, in_signature ? "inner 20" : "rank 2 has balance 0.25",
                   [&] { MoeLayer layer(context, options); });
      barrier(context);
    }));
  }
}

TEST(RouterLossesErrors, reach_every_rank) {
  expect_success(run_communicators({.ranks = kRanks}, [](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    const RouterOptions options{.experts = 4, .topk = 1, .balance = 1.0F};
    const Array logits(DType::f32, {6, 4});
    Routing routing;
    route(context, options, logits, routing);
    const std::vector<std::int64_t> counts{18, 0, 0, 0};
    const std::vector<std::int64_t> wrong{0, 4, 2, 6};
    const std::vector<std::int64_t> right{0, 3, 6};
    expect_error(ErrorCode::bad_argument, kWrong,
                 "shards are [0, 4, 2, 6], should ascend from 0 to the 6 tokens of this rank",
                 [&] { router_losses(context, options, routing, counts, context.rank() == kWrong ? wrong : right); });
    const RouterLosses losses = router_losses(context, options, routing, counts, right);
    EXPECT_EQ(losses.tokens, 18);
    EXPECT_EQ(losses.balance, 1.0F);  // all scores are 1 / 4, and only expert 0 is loaded: 4 * (1 * 1/4)
  }));
}

}  // namespace
}  // namespace expar::test
