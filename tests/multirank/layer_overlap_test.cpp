// Several micro-batches of one layer in flight: the bytes of one after the other.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <expar/parallel.h>

#include "tests/contract/ways.h"
#include "tests/fastest_backend.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

class Overlap : public testing::TestWithParam<RankSetup> {};
INSTANTIATE_TEST_SUITE_P(Layer, Overlap, testing::ValuesIn(all_setups()),
                         [](const auto& test) { return test.param.name(); });

/// One micro-batch of a rank, and what a layer makes of it.
struct Batch {
  Batch(const LayerCase& c, const Context& context, std::int64_t part)
      : x(rows_of(c, part == 0 ? c.x : c.dout, c.held(context.rank(), context.size()))),
        residual(rows_of(c, c.residual, c.held(context.rank(), context.size()))),
        out(x.view().dtype(), x.view().shape()),
        dx(x.view().dtype(), x.view().shape()),
        shards{0, x.view().size(0) / 2, x.view().size(0)} {
    // The second batch is shorter on some ranks, and empty on the last.
    if (part == 0) return;
    const std::int64_t tokens = context.rank() + 1 == context.size() ? 0 : x.view().size(0) / 2;
    for (Array* array : {&x, &residual, &out, &dx}) *array = Array(c.spec.dtype, {tokens, c.spec.hidden});
    for (std::int64_t i = 0; i < tokens * c.spec.hidden; ++i) {
      const float value = c.dout[static_cast<std::size_t>(i)];
      if (c.spec.dtype == DType::f32) x.as<float>()[i] = value;
      if (c.spec.dtype == DType::bf16) x.as<bf16>()[i] = bf16(value);
    }
    shards = {0, tokens / 2, tokens};
  }

  Array x, residual, out, dx;
  std::vector<std::int64_t> shards;
  MoeRecord record;
};

void expect_same(const ConstTensor& a, const ConstTensor& b, const std::string& what) {
  ASSERT_EQ(a.shape(), b.shape()) << what;
  EXPECT_TRUE(a.byte_size() == 0 || std::memcmp(a.data(), b.data(), a.byte_size()) == 0) << what;
}

std::vector<LayerSpec> specs() {
  std::vector<LayerSpec> all;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    all.push_back({.bias = true, .dtype = dtype, .shared_inner = 21, .shared_gate = true});
    all.push_back({.dtype = dtype, .recompute = true, .shared_inner = 21, .shared_gate = true});
    all.push_back({.dtype = dtype,
                   .capacity = {.policy = CapacityPolicy::reroute, .factor = 1.25},
                   .special = {.zero = 1, .copy = 1, .constant = 1}});
  }
  all.push_back({.shared_inner = 21, .bound = 64});
  return all;
}

TEST_P(Overlap, gives_the_bytes_of_one_batch_after_the_other) {
  for (const LayerSpec& spec : specs()) {
    const LayerCase c(spec);
    expect_success(run_communicators(GetParam(), [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
      MoeLayer layer(context, c.options());
      c.fill(layer);
      Batch first(c, context, 0), second(c, context, 1), early(c, context, 0), late(c, context, 1);
      for (Batch* batch : {&first, &second}) layer.forward(context, batch->x, batch->out, batch->residual);

      const auto start = [&](Batch& batch) {
        return layer.start_forward(context, batch.x, batch.out, batch.residual, {}, batch.record);
      };
      PendingForward a = start(early), b = start(late);
      a.run_experts();
      b.run_experts();
      b.finish();
      a.finish();
      expect_same(early.out, first.out, spec.name() + ", first batch");
      expect_same(late.out, second.out, spec.name() + ", second batch");
    }));
  }
}

TEST(OverlapOfSlices, gives_the_bytes_of_one_batch_after_the_other) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const LayerCase c({.dtype = dtype, .shared_inner = 21});
    expect_success(run_communicators({.ranks = 4}, [&](const Communicator& communicator) {
      const Context all(communicator, {.threads = 1, .backend = fastest_backend()});
      const Parallel ranks(all, {{"ep", 2}, {"tp", 2}});
      const Context& context = ranks.experts;
      MoeLayerOptions options = c.options();
      options.tensor = ranks.tensor;
      MoeLayer layer(context, options);
      c.fill(layer);
      Batch first(c, context, 0), second(c, context, 1), early(c, context, 0), late(c, context, 1);
      for (Batch* batch : {&first, &second}) layer.forward(context, batch->x, batch->out, batch->residual);
      std::vector<PendingForward> passes;
      for (Batch* batch : {&early, &late}) {
        passes.push_back(layer.start_forward(context, batch->x, batch->out, batch->residual, {}, batch->record));
      }
      for (PendingForward& pass : passes) pass.run_experts();
      for (PendingForward& pass : passes) pass.finish();
      expect_same(early.out, first.out, "first batch");
      expect_same(late.out, second.out, "second batch");
    }));
  }
}

/// Both batches forwards and backwards, and the experts' gradients after each.
struct Trained {
  Trained(const LayerCase& c, const Context& context, bool overlaps) : first(c, context, 0), second(c, context, 1) {
    MoeLayer layer(context, c.options());
    c.fill(layer);
    if (overlaps) {
      std::vector<PendingForward> passes;
      for (Batch* batch : batches) {
        passes.push_back(
            layer.start_forward(context, batch->x, batch->out, batch->residual, batch->shards, batch->record));
      }
      for (PendingForward& pass : passes) pass.finish();  // one after the other: each computes only now
    } else {
      for (Batch* batch : batches) {
        layer.forward(context, batch->x, batch->out, batch->residual, batch->shards, batch->record);
      }
    }
    for (Batch* batch : batches) {
      layer.backward(context, batch->record, batch->out, batch->dx);
      for (const Parameter& p : layer.expert_parameters("")) keep(p.gradient);
      for (const ConstTensor& shards : layer.dense_shard_gradients()) keep(shards);
    }
  }
  void keep(const ConstTensor& gradient) {
    const auto* values = gradient.as<float>();
    gradients.insert(gradients.end(), values, values + gradient.elements());
  }

  Batch first, second;
  Batch* const batches[2] = {&first, &second};
  std::vector<float> gradients;
};

TEST_P(Overlap, leaves_each_batch_what_its_backward_pass_needs) {
  for (LayerSpec spec : specs()) {
    spec.bound = 0;
    const LayerCase c(spec);
    expect_success(run_communicators(GetParam(), [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
      const Trained apart(c, context, false), together(c, context, true);
      for (std::size_t i = 0; i < 2; ++i) {
        expect_same(together.batches[i]->out, apart.batches[i]->out, spec.name());
        expect_same(together.batches[i]->dx, apart.batches[i]->dx, spec.name());
      }
      ASSERT_EQ(together.gradients.size(), apart.gradients.size());
      EXPECT_EQ(std::memcmp(together.gradients.data(), apart.gradients.data(), apart.gradients.size() * sizeof(float)),
                0)
          << spec.name();
    }));
  }
}

TEST_P(Overlap, ends_a_batch_although_the_next_one_was_refused) {
  const LayerCase c({.shared_inner = 21});
  expect_success(run_communicators(GetParam(), [&](const Communicator& communicator) {
    const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
    MoeLayer layer(context, c.options());
    c.fill(layer);
    Batch wanted(c, context, 0), batch(c, context, 0), refused(c, context, 0);
    layer.forward(context, wanted.x, wanted.out, wanted.residual);

    PendingForward pass = layer.start_forward(context, batch.x, batch.out, batch.residual, {}, batch.record);
    const std::int64_t tokens = refused.x.view().size(0) + (context.rank() == 0 ? 1 : 0);
    refused.out = Array(c.spec.dtype, {tokens, c.spec.hidden});
    const Error error = error_of([&] { layer.start_forward(context, refused.x, refused.out, {}, {}, refused.record); });
    EXPECT_EQ(error.code(), ErrorCode::bad_argument);
    EXPECT_EQ(error.rank(), 0);
    EXPECT_EQ(error.message().rfind("out is f32", 0), 0U) << error.message();
    pass.finish();
    expect_same(batch.out, wanted.out, "the batch before");
  }));
}

}  // namespace
}  // namespace expar::test
