// What must hold of a layer whatever its numbers are: experts that change nothing, and capacities that are filled up.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include <expar/random.h>

#include "tests/fastest_backend.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

void draw(const Array& to, const char* name, int rank) {
  const Random random(static_cast<std::uint64_t>(rank), name);
  for (std::int64_t i = 0; i < to.view().elements(); ++i)
    to.as<float>()[i] = random.normal(static_cast<std::uint64_t>(i));
}

// ---- experts that change nothing

constexpr std::int64_t kHidden = 7, kExperts = 6, kTopk = 2;

/// silu(v) - silu(-v) = v, and gelu alike: rows v and -v upwards, their difference downwards.
void make_identities(MoeLayer& layer) {
  const std::vector<Parameter> experts = layer.expert_parameters("");
  const auto [up, down] = std::pair(experts[0].value, experts[1].value);
  const std::int64_t inner = 2 * kHidden;
  for (std::int64_t e = 0; e < layer.local_experts().count; ++e) {
    for (std::int64_t f = 0; f < inner; ++f) {
      const float sign = f < kHidden ? 1.0F : -1.0F;
      for (std::int64_t h = 0; h < kHidden; ++h) {
        const float value = f % kHidden == h ? sign : 0.0F;
        up.as<float>()[(e * inner + f) * kHidden + h] = value;
        down.as<float>()[(e * kHidden + h) * inner + f] = value;
      }
    }
  }
  layer.refresh();
}

void check_identities(const Context& context, const MoeLayerOptions& options, const std::string& where) {
  MoeLayer layer(context, options);
  layer.initialise(3, "");
  make_identities(layer);
  const std::int64_t tokens = context.rank() == 1 ? 0 : 9 + context.rank();
  const Array x(DType::f32, {tokens, kHidden}), dout(DType::f32, {tokens, kHidden});
  const Array out(DType::f32, {tokens, kHidden}), dx(DType::f32, {tokens, kHidden});
  draw(x, "x", context.rank());
  draw(dout, "dout", context.rank());
  const std::vector<std::int64_t> shards{0, tokens};
  MoeRecord record;
  layer.forward(context, x, out, {}, shards, record);
  layer.backward(context, record, dout, dx);

  // The output is x times the sum of its weights, so that each weight's gradient is <dout, x>.
  const std::int64_t slots = record.routing.weights.size(1);
  const Array dweights(DType::f32, {tokens, slots}), dlogits(DType::f32, {tokens, kExperts});
  std::vector<double> sums(at(tokens));
  for (std::int64_t t = 0; t < tokens; ++t) {
    double product = 0;
    for (std::int64_t h = 0; h < kHidden; ++h)
      product += double{x.as<float>()[t * kHidden + h]} * double{dout.as<float>()[t * kHidden + h]};
    for (std::int64_t i = t * slots; i < (t + 1) * slots; ++i) {
      sums[at(t)] += double{record.routing.weights.as<float>()[i]};
      if (record.routing.ids.as<std::int32_t>()[i] >= 0) dweights.as<float>()[i] = static_cast<float>(product);
    }
  }
  route_backward(context, options.router, record.routing, record.losses, dweights, dlogits);
  const float* router = layer.dense_parameters("").front().value.as<float>();
  std::vector<double> drouter(kExperts * kHidden);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t h = 0; h < kHidden; ++h) {
      const std::int64_t i = t * kHidden + h;
      double want = sums[at(t)] * double{dout.as<float>()[i]};
      for (std::int64_t e = 0; e < kExperts; ++e) {
        const double dz = dlogits.as<float>()[t * kExperts + e];
        want += dz * double{router[e * kHidden + h]};
        drouter[at(e * kHidden + h)] += dz * double{x.as<float>()[i]};
      }
      EXPECT_NEAR(out.as<float>()[i], sums[at(t)] * double{x.as<float>()[i]}, 1e-5) << where;
      EXPECT_NEAR(dx.as<float>()[i], want, 3e-5) << where;
    }
  }
  for (std::size_t i = 0; i < drouter.size(); ++i)
    EXPECT_NEAR(layer.dense_shard_gradients().front().as<float>()[i], drouter[i], 1e-4) << where << ", weight " << i;
}

TEST(LayerAlgebra, of_experts_that_change_nothing_is_the_sum_of_weights) {
  for (const std::string_view name : router_presets()) {
    for (const int ranks : {1, 3}) {
      expect_success(run_communicators({.ranks = ranks}, [&](const Communicator& communicator) {
        const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
        MoeLayerOptions options{
            .hidden = kHidden, .inner = 2 * kHidden, .router = router_preset(name, kExperts, kTopk)};
        const std::string where = std::string(name) + " on " + std::to_string(ranks) + " ranks";
        for (const Activation activation : {Activation::silu, Activation::gelu}) {
          options.activation = activation;
          check_identities(context, options, where);
        }
        options.recompute = true;
        check_identities(context, options, where + ", recomputed");
      }));
    }
  }
}

// ---- capacities that are filled up

/// What an expert layer does with rows in Layout::padded: as many for each expert, zeros behind those that there are.
struct Padded {
  const Context& context;
  const LayerCase& c;
  MoeLayer& layer;
  const MoeRecord& record;  // of the layer's own pass: its choice and what the capacity left of it

  Array up_gradient, down_gradient, up_bias_gradient, down_bias_gradient;

  void run(ConstTensor x, ConstTensor dout, const Tensor& out, const Tensor& dx);
};

void Padded::run(ConstTensor x, ConstTensor dout, const Tensor& out, const Tensor& dx) {
  const std::int64_t H = c.spec.hidden, F = c.spec.inner, room = record.capacity.rows;
  const Kernels& kernels = context.kernels();
  const std::vector<Parameter> experts = layer.expert_parameters("");
  const Plan plan = make_plan(context, record.capacity.ids, {.experts = c.spec.experts});
  const DispatchOptions as_padded{.layout = Layout::padded, .capacity = room};
  const Inbox inbox = dispatch(context, x, record.capacity.weights, plan, as_padded);
  const std::int64_t local = plan.local().count, rows = local * room;
  std::vector<std::int64_t> offsets;
  for (std::int64_t e = 0; e <= local; ++e) offsets.push_back(e * room);
  const Groups groups{static_cast<int>(local), offsets.data()};
  const auto all = [](const ConstTensor& tensor, std::int64_t width) {
    return Rows{.base = {tensor.data(), nullptr}, .dtype = DType::f32, .width = width};
  };

  const Array pre(DType::f32, {rows, F}), h(DType::f32, {rows, F});
  Outbox y = make_outbox(context, inbox, H, DType::f32);
  kernels.gemm_nt({.groups = groups,
                   .n = F,
                   .k = H,
                   .rows = all(inbox.packed(), H),
                   .w = {experts[0].value.data()},
                   .bias = experts[2].value.as<float>(),
                   .y = pre.view().data()},
                  context.pool());
  kernels.activate({.act = c.spec.activation, .rows = rows, .inner = F, .pre = pre.view().data(), .h = h.view().data()},
                   context.pool());
  kernels.gemm_nt({.groups = groups,
                   .n = H,
                   .k = F,
                   .rows = all(h, F),
                   .w = {experts[1].value.data()},
                   .bias = experts[3].value.as<float>(),
                   .y = y.rows().data()},
                  context.pool());
  combine(context, plan, y, record.capacity.weights, out);

  const Inbox gradients = dispatch(context, dout, {}, plan, as_padded);
  const Array dy(DType::f32, {rows, H}), dh(DType::f32, {rows, F}), dpre(DType::f32, {rows, F});
  for (std::int64_t e = 0; e < local; ++e) {
    for (std::int64_t i = 0; i < plan.rows()[at(e)]; ++i) {
      const float weight = inbox.weights()[at(plan.offsets()[at(e)] + i)];
      const std::int64_t row = (e * room + i) * H;
      for (std::int64_t j = row; j < row + H; ++j) dy.as<float>()[j] = weight * gradients.packed().as<float>()[j];
    }
  }
  up_gradient = Array(DType::f32, experts[0].value.shape());
  down_gradient = Array(DType::f32, experts[1].value.shape());
  up_bias_gradient = Array(DType::f32, experts[2].value.shape());
  down_bias_gradient = Array(DType::f32, experts[3].value.shape());
  Outbox dx_rows = make_outbox(context, inbox, H, DType::f32);
  kernels.gemm_nn({.groups = groups,
                   .n = H,
                   .k = F,
                   .dy = dy.view().data(),
                   .w = {experts[1].value.data()},
                   .dx = dh.view().data()},
                  context.pool());
  kernels.activate_grad({.act = c.spec.activation,
                         .rows = rows,
                         .inner = F,
                         .pre = pre.view().data(),
                         .dh = dh.view().data(),
                         .dpre = dpre.view().data()},
                        context.pool());
  kernels.gemm_tn({.groups = groups,
                   .n = H,
                   .k = F,
                   .dy = dy.view().data(),
                   .rows = all(h, F),
                   .dw = down_gradient.as<float>(),
                   .dbias = down_bias_gradient.as<float>()},
                  context.pool());
  kernels.gemm_tn({.groups = groups,
                   .n = F,
                   .k = H,
                   .dy = dpre.view().data(),
                   .rows = all(inbox.packed(), H),
                   .dw = up_gradient.as<float>(),
                   .dbias = up_bias_gradient.as<float>()},
                  context.pool());
  kernels.gemm_nn({.groups = groups,
                   .n = F,
                   .k = H,
                   .dy = dpre.view().data(),
                   .w = {experts[0].value.data()},
                   .dx = dx_rows.rows().data()},
                  context.pool());
  combine(context, plan, dx_rows, unweighted, dx);
}

bool same_bytes(const ConstTensor& a, const ConstTensor& b) {
  return a.shape() == b.shape() && std::memcmp(a.data(), b.data(), a.byte_size()) == 0;
}

TEST(LayerAlgebra, drops_as_if_every_expert_were_filled_up_to_its_capacity) {
  for (const CapacityPolicy policy : {CapacityPolicy::drop_by_position, CapacityPolicy::drop_by_score}) {
    for (const int ranks : {1, 3}) {
      expect_success(run_communicators({.ranks = ranks}, [&](const Communicator& communicator) {
        const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
        LayerCase c({.experts = 5,
                     .topk = 2,
                     .activation = Activation::silu,
                     .bias = true,
                     .capacity = {.policy = policy, .factor = 0.75}});
        // Logits that are all zero: the router adds nothing to dx, and sends all to where they are told to go.
        c.router.assign(c.router.size(), 0.0F);
        const LayerCase::Held held = c.held(context.rank(), ranks);
        const std::int64_t first = c.shards[held.first];
        MoeLayer layer(context, c.options());
        c.fill(layer);
        const Array x = rows_of(c, c.x, held), dout = rows_of(c, c.dout, held);
        const std::int64_t tokens = x.view().size(0);
        const std::vector<std::int64_t> shards{0, tokens};
        const Array ids(DType::int32, {tokens, 2});
        for (std::int64_t t = 0; t < tokens; ++t) {
          ids.as<std::int32_t>()[2 * t] = static_cast<std::int32_t>((first + t) % 7 % 5);
          ids.as<std::int32_t>()[2 * t + 1] = static_cast<std::int32_t>(((first + t) % 7 + 1 + (first + t) % 3) % 5);
        }
        const Array out(DType::f32, x.view().shape()), dx(DType::f32, x.view().shape());
        const Array padded_out(DType::f32, x.view().shape()), padded_dx(DType::f32, x.view().shape());
        MoeRecord record;
        layer.forward(context, x, out, {}, shards, record, {.ids = ids});
        layer.backward(context, record, dout, dx);
        std::int64_t dropped = 0, most = 0, least = c.tokens();
        for (const std::int64_t slots : record.capacity.dropped) dropped += slots;
        for (const std::int64_t rows : record.plan.expert_totals())
          most = std::max(most, rows), least = std::min(least, rows);
        EXPECT_GT(dropped, 0);
        EXPECT_EQ(most, record.capacity.rows);
        EXPECT_LT(least, record.capacity.rows);  // so that there is something to fill up

        Padded padded{context, c, layer, record, {}, {}, {}, {}};
        padded.run(x, dout, padded_out, padded_dx);
        EXPECT_TRUE(same_bytes(out, padded_out));
        EXPECT_TRUE(same_bytes(dx, padded_dx));
        const std::vector<Parameter> experts = layer.expert_parameters("");
        EXPECT_TRUE(same_bytes(experts[0].gradient, padded.up_gradient));
        EXPECT_TRUE(same_bytes(experts[1].gradient, padded.down_gradient));
        EXPECT_TRUE(same_bytes(experts[2].gradient, padded.up_bias_gradient));
        EXPECT_TRUE(same_bytes(experts[3].gradient, padded.down_bias_gradient));
      }));
    }
  }
}

}  // namespace
}  // namespace expar::test
