// The layer of ranks that all have the same tokens: gathered, the bytes of the plain layer; sliced, a loop in double
// precision; with callers' kernels, results that can be worked out exactly.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <expar/hidden_moe.h>
#include <expar/layer.h>
#include <expar/mesh.h>
#include <expar/random.h>

#include "tests/contract/ways.h"
#include "tests/fastest_backend.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/oracle.h"

namespace expar::test {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

class Hidden : public testing::TestWithParam<RankSetup> {};
INSTANTIATE_TEST_SUITE_P(all, Hidden, testing::ValuesIn(all_setups({1, 2, 3, 4})),
                         [](const auto& test) { return test.param.name(); });

std::vector<Outcome> end_on(const RankSetup& setup, const std::function<void(const Context&)>& rank_main) {
  return run_communicators(setup, [&](Communicator communicator) {
    rank_main(Context(std::move(communicator), {.threads = 1, .backend = fastest_backend()}));
  });
}
void run_on(const RankSetup& setup, const std::function<void(const Context&)>& rank_main) {
  expect_success(end_on(setup, rank_main));
}

Array array_of(const std::vector<float>& from, DType dtype, const Shape& shape, std::int64_t first = 0) {
  Array to(dtype, shape);
  for (std::int64_t i = 0; i < shape.elements(); ++i) {
    if (dtype == DType::f32) to.as<float>()[i] = from[at(first + i)];
    if (dtype == DType::bf16) to.as<bf16>()[i] = bf16(from[at(first + i)]);
  }
  return to;
}

Array columns(const ConstTensor& x, const Part& part) {
  const std::size_t size = size_of(x.dtype());
  Array slice(x.dtype(), {x.size(0), part.end - part.begin});
  for (std::int64_t t = 0; t < x.size(0) && part.end > part.begin; ++t) {
    std::memcpy(slice.view().bytes() + at(t * slice.view().size(1)) * size,
                x.bytes() + at(t * x.size(1) + part.begin) * size, at(part.end - part.begin) * size);
  }
  return slice;
}

bool same(const ConstTensor& a, const ConstTensor& b) {
  return a.shape() == b.shape() && (a.byte_size() == 0 || std::memcmp(a.data(), b.data(), a.byte_size()) == 0);
}

/// This rank's experts of `c`.
struct Held {
  Held(const LayerCase& c, const Context& context) {
    const auto [first, count] = experts_of(context.rank(), context.size(), c.spec.experts);
    const std::int64_t H = c.spec.hidden, F = c.spec.inner, W = c.wide();
    up = array_of(c.up, c.spec.dtype, {count, W, H}, first * W * H);
    down = array_of(c.down, c.spec.dtype, {count, H, F}, first * H * F);
    weights.up = {up.view().data(), c.spec.dtype};
    weights.down = {down.view().data(), c.spec.dtype};
    if (!c.spec.bias) return;
    up_bias = array_of(c.up_bias, DType::f32, {count, W}, first * W);
    down_bias = array_of(c.down_bias, DType::f32, {count, H}, first * H);
    weights.up_bias = up_bias;
    weights.down_bias = down_bias;
  }
  Array up, down, up_bias, down_bias;
  ExpertWeights weights;
};

TEST_P(Hidden, gathered_slices_are_together_the_bytes_of_the_plain_layer_on_one_rank) {
  const std::vector<LayerSpec> specs = {
      {.experts = 8, .topk = 2, .hidden = 48},
      {.experts = 5, .topk = 3, .bias = true, .dtype = DType::bf16},
      {.experts = 8, .bias = true, .weights_on = WeightsOn::inner, .dtype = DType::bf16},
      {.experts = 3, .weights_on = WeightsOn::input, .hidden = 2},  // fewer columns than ranks, and fewer experts
  };
  for (const LayerSpec& spec : specs) {
    const LayerCase c(spec);
    run_on(GetParam(), [&](const Context& context) {
      const Context alone = context.on(context.communicator().split(context.rank()));
      MoeLayer plain(alone, c.options());
      c.fill(plain);
      const Array x = array_of(c.x, spec.dtype, {c.tokens(), spec.hidden}), wanted(spec.dtype, x.view().shape());
      plain.forward(alone, x, wanted);
      const Routing& routing = plain.inference_record().routing;

      const Part part = part_of(spec.hidden, context.rank(), context.size());
      const Array slice = columns(x, part), out(spec.dtype, slice.view().shape());
      const Held held(c, context);
      for (const bool slices : {false, true}) {
        HiddenMoe moe(context, {.hidden = spec.hidden, .router = c.options().router, .slices = slices});
        EXPECT_EQ(moe.width(), spec.hidden);
        const HiddenMoeInputs inputs{.x = slices ? slice : x, .ids = routing.ids, .weights = routing.weights};
        for (int pass = 0; pass < 2; ++pass) {
          moe.forward(context, inputs, c.options().expert_shape(), held.weights, out);
          EXPECT_TRUE(same(out, columns(wanted, part))) << spec.name() << ", slices " << slices;
        }
      }
    });
  }
}

/// A batch whose every step is exact in f32: small whole numbers and powers of two.
struct Exact {
  explicit Exact(std::int64_t hidden, std::int64_t tokens = 9) : x(DType::f32, {tokens, hidden}) {
    const Random random(3, "exact");
    for (std::int64_t i = 0; i < x.view().elements(); ++i) x.as<float>()[i] = static_cast<float>(i % 23);
    for (std::int64_t i = 0; i < tokens * 2; ++i) {
      ids.push_back(static_cast<std::int32_t>(random.bits(at(i)) % 5));
      if (i == 3) ids.back() = -1;
      weights.push_back(1.0F / static_cast<float>(1 << i % 3));
    }
  }
  std::int64_t tokens() const { return x.view().size(0); }
  HiddenMoeInputs inputs(const ConstTensor& of) const {
    return {
        .x = of, .ids = ConstTensor(ids.data(), {tokens(), 2}), .weights = ConstTensor(weights.data(), {tokens(), 2})};
  }
  /// Where each expert multiplies by one more than its number.
  double expected(std::int64_t t, std::int64_t h) const {
    double sum = 0;
    for (std::size_t k = 0; k < 2; ++k) {
      const std::size_t slot = at(t) * 2 + k;
      if (ids[slot] >= 0)
        sum += double{weights[slot]} * (ids[slot] + 1) * double{x.as<float>()[t * x.view().size(1) + h]};
    }
    return sum;
  }
  std::int64_t rows_of(std::int64_t expert) const { return std::count(ids.begin(), ids.end(), expert); }

  Array x;
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
};

TEST_P(Hidden, runs_a_kernel_of_the_callers_with_the_group_list_it_asks_for) {
  for (const std::int64_t hidden : {12, 7, 3, 4}) {
    const Exact batch(hidden, hidden == 4 ? 0 : 9);  // no tokens, too
    run_on(GetParam(), [&](const Context& context) {
      const Part part = part_of(hidden, context.rank(), context.size());
      const ExpertRange local = experts_of(context.rank(), context.size(), 5);
      const Array slice = columns(batch.x, part), out(DType::f32, slice.view().shape());
      for (const auto partition : {HiddenPartition::gathered, HiddenPartition::sliced}) {
        for (const auto list : {GroupList::cumulative, GroupList::counts}) {
          for (const bool slices : {false, true}) {
            const std::int64_t copies = partition == HiddenPartition::sliced ? context.size() : 1;
            const std::int64_t width = (hidden + copies - 1) / copies;
            const auto kernel = [&](const ExpertBatch& of) {
              ASSERT_EQ(std::ssize(of.group_list), local.count);
              EXPECT_EQ(of.rows.size(1), width);
              std::int64_t row = 0;
              for (std::int64_t e = 0; e < local.count; ++e) {
                const std::int64_t rows = copies * batch.rows_of(local.first + e);
                EXPECT_EQ(of.group_list[at(e)], list == GroupList::counts ? rows : row + rows);
                for (std::int64_t i = row * width; i < (row + rows) * width; ++i)
                  of.out.as<float>()[i] = of.rows.as<float>()[i] * static_cast<float>(local.first + e + 1);
                row += rows;
              }
              EXPECT_EQ(of.out.shape(), (Shape{row, width}));
            };
            HiddenMoe moe(context, {.hidden = hidden,
                                    .router = {.experts = 5, .topk = 2},
                                    .partition = partition,
                                    .slices = slices,
                                    .group_list = list});
            EXPECT_EQ(moe.width(), width);
            std::fill_n(out.as<float>(), out.view().elements(), 1e30F);
            moe.forward(context, batch.inputs(slices ? slice : batch.x), kernel, out);
            for (std::int64_t t = 0, i = 0; t < batch.tokens(); ++t) {
              for (std::int64_t h = part.begin; h < part.end; ++h, ++i)
                EXPECT_EQ(double{out.as<float>()[i]}, batch.expected(t, h)) << "token " << t << ", column " << h;
            }
          }
        }
      }
    });
  }
}

TEST_P(Hidden, fills_narrower_slices_up_with_zeros) {
  const Exact batch(7);
  run_on(GetParam(), [&](const Context& context) {
    HiddenMoe moe(context, {.hidden = 7, .router = {.experts = 5, .topk = 2}, .partition = HiddenPartition::sliced});
    const ExpertRange local = experts_of(context.rank(), context.size(), 5);
    const Part part = part_of(7, context.rank(), context.size());
    for (const DType dtype : {DType::f32, DType::bf16}) {  // the second one where the first has left its numbers
      const Array ones = array_of(std::vector<float>(63, 1), dtype, {9, 7});
      const Array out(dtype, {9, part.end - part.begin});
      const auto kernel = [&](const ExpertBatch& of) {
        std::int64_t row = 0;
        for (std::int64_t e = 0; e < local.count; row = of.group_list[at(e)], ++e) {
          double sum = 0;
          for (std::int64_t i = row * moe.width(); i < of.group_list[at(e)] * moe.width(); ++i) {
            float element = 0;
            to_f32(ConstTensor(of.rows.bytes() + at(i) * size_of(dtype), dtype, {1}), &element);
            sum += double{element};
          }
          EXPECT_EQ(sum, static_cast<double>(7 * batch.rows_of(local.first + e)));
        }
        std::memcpy(of.out.data(), of.rows.data(), of.rows.byte_size());
      };
      moe.forward(context, batch.inputs(ones), kernel, out);
    }
  });
}

using oracle::Real;
using oracle::Vector;

/// Numbers around zero, the same wherever they are asked for.
std::vector<float> draw(const std::string& stream, std::int64_t count) {
  const Random random(5, stream);
  std::vector<float> values(at(count));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = random.uniform(i) - 0.5F;
  return values;
}

/// Experts of rows of `width`, one set of them for each of `sets` (tensor-parallel ranks).
struct SlicedExperts {
  std::int64_t experts, inner, width;
  std::vector<float> up, down;  // [E, 2F, W], [E, W, F]
  SlicedExperts(std::int64_t e, std::int64_t f, std::int64_t w, int set)
      : experts(e),
        inner(f),
        width(w),
        up(draw("up" + std::to_string(set), e * 2 * f * w)),
        down(draw("down" + std::to_string(set), e * w * f)) {}

  /// Expert `e` at a slice, by the formula.
  Vector apply(std::int64_t e, Vector slice) const {
    slice.resize(at(width));
    oracle::Layer layer;
    layer.inner = at(inner);
    const auto own = [&](const std::vector<float>& all) {
      const auto count = static_cast<std::ptrdiff_t>(all.size()) / experts;
      return Vector(all.begin() + e * count, all.begin() + (e + 1) * count);
    };
    const Vector pre = oracle::times(own(up), slice);
    Vector h;
    for (std::size_t f = 0; f < at(inner); ++f) h.push_back(oracle::Activated(layer, pre, f).h);
    return oracle::times(own(down), h);
  }
};

/// Checks `out`, the columns `part` of [T, hidden], against each slot's expert at that slice alone.
void check_sliced(const SlicedExperts& experts, const std::vector<float>& x, std::int64_t hidden, const Part& part,
                  const std::vector<std::int32_t>& ids, const std::vector<float>& weights, const ConstTensor& out) {
  const std::int64_t wide = part.end - part.begin, tokens = out.size(0);
  const std::size_t topk = ids.size() / at(tokens);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const auto row = x.begin() + t * hidden;
    Vector sum(at(wide));
    for (std::size_t k = 0; k < topk; ++k) {
      const std::size_t slot = at(t) * topk + k;
      if (ids[slot] < 0) continue;
      const Vector y = experts.apply(ids[slot], Vector(row + part.begin, row + part.end));
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += Real(double{weights[slot]}) * y[i];
    }
    for (std::size_t i = 0; i < sum.size(); ++i) {
      EXPECT_NEAR(double{out.as<float>()[at(t * wide) + i]}, sum[i].value, 8 * sum[i].error) << "token " << t;
    }
  }
}

struct HeldSlices {
  HeldSlices(const SlicedExperts& of, const Context& context) {
    const auto [first, count] = experts_of(context.rank(), context.size(), of.experts);
    up = array_of(of.up, DType::f32, {count, 2 * of.inner, of.width}, first * 2 * of.inner * of.width);
    down = array_of(of.down, DType::f32, {count, of.width, of.inner}, first * of.width * of.inner);
    weights.up.data = up.view().data();
    weights.down.data = down.view().data();
  }
  Array up, down;
  ExpertWeights weights;
};

TEST_P(Hidden, sliced_sends_each_slice_through_its_expert_alone) {
  for (const std::int64_t hidden : {24, 35, 3}) {
    const Exact routes(hidden, 13);
    const std::vector<float> x = draw("x", 13 * hidden);
    run_on(GetParam(), [&](const Context& context) {
      const Part part = part_of(hidden, context.rank(), context.size());
      HiddenMoe moe(context,
                    {.hidden = hidden, .router = {.experts = 5, .topk = 2}, .partition = HiddenPartition::sliced});
      const SlicedExperts experts(5, 11, moe.width(), 0);
      const HeldSlices held(experts, context);
      const Array out(DType::f32, {13, part.end - part.begin});
      moe.forward(context, routes.inputs(ConstTensor(x.data(), {13, hidden})), {.hidden = moe.width(), .inner = 11},
                  held.weights, out);
      check_sliced(experts, x, hidden, part, routes.ids, routes.weights, out);
    });
  }
}

TEST(HiddenOnAMesh, slices_by_expert_and_tensor_parallel_ranks_at_once) {
  constexpr std::int64_t kHidden = 22;  // 11 for each tensor-parallel rank, 5 and 6 for their expert-parallel ones
  const Exact routes(kHidden, 13);
  const std::vector<float> x = draw("x", 13 * kHidden);
  for (const Kind kind : {Kind::threads, Kind::shm}) {
    run_on({.kind = kind, .ranks = 4}, [&](const Context& context) {
      const Mesh mesh(context.communicator(), {{"ep", 2}, {"tp", 2}});
      const Context group = context.on(mesh.group("ep"));
      const Part of_group = part_of(kHidden, mesh.coordinate("tp"), 2);
      const std::int64_t hidden = of_group.end - of_group.begin;
      const Array own = columns(ConstTensor(x.data(), {13, kHidden}), of_group);
      HiddenMoe moe(group,
                    {.hidden = hidden, .router = {.experts = 5, .topk = 2}, .partition = HiddenPartition::sliced});
      const SlicedExperts experts(5, 11, moe.width(), mesh.coordinate("tp"));
      const HeldSlices held(experts, group);
      Part part = part_of(hidden, group.rank(), 2);
      const Array out(DType::f32, {13, part.end - part.begin});
      moe.forward(group, routes.inputs(own), {.hidden = moe.width(), .inner = 11}, held.weights, out);
      part.begin += of_group.begin, part.end += of_group.begin;
      check_sliced(experts, x, kHidden, part, routes.ids, routes.weights, out);
    });
  }
}

/// Multiplies every row by two, whatever its expert.
void twice(const ExpertBatch& of) {
  for (std::int64_t i = 0; i < of.out.elements(); ++i) of.out.as<float>()[i] = 2 * of.rows.as<float>()[i];
}

TEST_P(Hidden, takes_router_logits_and_a_bias) {
  constexpr std::int64_t kTokens = 6, kExperts = 5, kTopk = 3, kHidden = 3;  // no column for a fourth rank
  const std::vector<float> logits = draw("logits", kTokens * kExperts), x = draw("x", kTokens * kHidden);
  run_on(GetParam(), [&](const Context& context) {
    const Part part = part_of(kHidden, context.rank(), context.size());
    const std::int64_t wide = part.end - part.begin;
    const Array bias = array_of(draw("bias", kHidden), DType::f32, {wide}, part.begin);
    const Array out(DType::f32, {kTokens, wide});
    for (const auto partition : {HiddenPartition::gathered, HiddenPartition::sliced}) {
      for (const bool normalize : {true, false}) {
        HiddenMoe moe(context, {.hidden = kHidden,
                                .router = {.experts = kExperts, .topk = kTopk, .renormalise = false},
                                .normalize_router_logits = normalize,
                                .partition = partition});
        moe.forward(context,
                    {.x = ConstTensor(x.data(), {kTokens, kHidden}),
                     .logits = ConstTensor(logits.data(), {kTokens, kExperts}),
                     .bias = bias},
                    twice, out);
        for (std::int64_t t = 0; t < kTokens; ++t) {
          std::vector<double> scores(logits.begin() + t * kExperts, logits.begin() + (t + 1) * kExperts);
          double total = 0;
          for (const double z : scores) total += std::exp(z);
          std::sort(scores.begin(), scores.end(), std::greater<>());
          double weight = 0;
          for (std::size_t k = 0; k < kTopk; ++k) weight += normalize ? std::exp(scores[k]) / total : scores[k];
          for (std::int64_t i = 0; i < wide; ++i) {
            const double wanted =
                2 * weight * double{x[at(t * kHidden + part.begin + i)]} + double{bias.as<float>()[i]};
            EXPECT_NEAR(double{out.as<float>()[t * wide + i]}, wanted, 32 * oracle::kF32) << "token " << t;
          }
        }
      }
    }
  });
}

TEST_P(Hidden, tells_every_rank_what_is_wrong_on_one) {
  const int ranks = GetParam().ranks;
  const Exact batch(8);
  run_on(GetParam(), [&](const Context& context) {
    const bool odd = context.rank() == ranks - 1;
    const Part part = part_of(8, context.rank(), ranks);
    const Array out(DType::f32, {batch.tokens(), part.end - part.begin});
    const Array narrow(DType::f32, {batch.tokens(), 3});
    Array logits(DType::f32, {batch.tokens(), 5});
    const RouterOptions router{.experts = 5, .topk = 2};
    for (const auto partition : {HiddenPartition::gathered, HiddenPartition::sliced}) {
      HiddenMoe moe(context, {.hidden = 8, .router = router, .partition = partition});
      const auto expect = [&](const HiddenMoeInputs& inputs, const std::string& wanted) {
        const Error error = error_of([&] { moe.forward(context, inputs, twice, out); });
        EXPECT_EQ(error.code(), ErrorCode::bad_argument);
        EXPECT_EQ(error.message(), wanted);
        EXPECT_EQ(error.rank(), ranks - 1);
      };
      expect(batch.inputs(odd ? narrow : batch.x), "x is f32 [9, 3], should be f32 [9, 8]");
      HiddenMoeInputs both = batch.inputs(batch.x);
      if (odd) both.logits = logits;
      expect(both, "either logits are given, or ids and weights");
      if (odd) logits.as<float>()[7] = std::numeric_limits<float>::quiet_NaN();
      expect({.x = batch.x, .logits = logits}, "logits[1,2] is nan");
      logits.as<float>()[7] = 0;

      Exact other(8);
      if (odd) other.ids[4] = 7;
      expect(other.inputs(batch.x), "ids[2,0] = 7 is not below num_experts 5");
      const auto message_of = [&](const std::function<void()>& call) {
        const Error error = error_of(call);
        EXPECT_EQ(error.rank(), ranks - 1);
        return error.message();
      };
      EXPECT_EQ(message_of([&] { moe.forward(context, batch.inputs(batch.x), odd ? nullptr : twice, out); }),
                "there is no expert kernel");
      const ExpertShape wrong{.hidden = odd ? 5 : moe.width(), .inner = 1};
      EXPECT_EQ(message_of([&] { moe.forward(context, batch.inputs(batch.x), wrong, {}, out); }),
                "the experts take f32 rows of 5, not f32 ones of " + std::to_string(moe.width()));
      moe.forward(context, batch.inputs(batch.x), twice, out);  // still usable
    }
    if (ranks == 1) return;
    HiddenMoe moe(context, {.hidden = 8, .router = router});
    Exact other(8);
    other.ids[4] = odd ? 1 : 2;
    EXPECT_EQ(error_of([&] { moe.forward(context, other.inputs(batch.x), twice, out); }).code(), ErrorCode::mismatch);
    const HiddenMoeOptions differing{.hidden = 8, .router = router, .slices = odd};
    EXPECT_EQ(error_of([&] { HiddenMoe(context, differing); }).code(), ErrorCode::mismatch);
    HiddenMoeOptions scaled{.hidden = 8, .router = router};
    scaled.router.scaling = odd ? 2.0F : 1.0F;
    const std::string message = error_of([&] { HiddenMoe(context, scaled); }).message();
    EXPECT_NE(message.find("routers disagree: rank 0 has scaling "), std::string::npos) << message;
  });
}

TEST_P(Hidden, refuses_options_that_cannot_be) {
  run_on(GetParam(), [&](const Context& context) {
    const auto expect = [&](const HiddenMoeOptions& options, const std::string& wanted) {
      const Error error = error_of([&] { HiddenMoe(context, options); });
      EXPECT_EQ(error.code(), ErrorCode::bad_argument);
      EXPECT_EQ(error.message(), wanted);
    };
    expect({.hidden = 0, .router = {.experts = 5, .topk = 2}}, "hidden is 0, must be at least 1");
    expect({.hidden = 4, .router = router_preset("sinkhorn", 5, 2)},
           "all ranks have the same tokens: the router cannot choose over the batches of all ranks");
  });
}

TEST_P(Hidden, ends_the_job_with_the_exception_of_a_kernel) {
  const Exact batch(8);
  const Error error = expect_same_error(end_on(GetParam(), [&](const Context& context) {
    const Part part = part_of(8, context.rank(), context.size());
    const Array out(DType::f32, {batch.tokens(), part.end - part.begin});
    HiddenMoe moe(context, {.hidden = 8, .router = {.experts = 5, .topk = 2}});
    const auto kernel = [&](const ExpertBatch& of) {
      if (context.rank() == context.size() - 1) throw std::runtime_error("the kernel is out of order");
      twice(of);
    };
    moe.forward(context, batch.inputs(batch.x), kernel, out);
  }));
  EXPECT_EQ(error.message(), "the kernel is out of order");
  EXPECT_EQ(error.rank(), GetParam().ranks - 1);
}

}  // namespace
}  // namespace expar::test
