// Inference with the layer: bounded plans give the bytes of exact ones.
#include <gtest/gtest.h>

#include <cstring>

#include "tests/fastest_backend.h"
#include "tests/multirank/layer_case.h"
#include "tests/multirank/processes.h"

namespace expar::test {
namespace {

class Inference : public testing::TestWithParam<RankSetup> {};
INSTANTIATE_TEST_SUITE_P(Layer, Inference, testing::ValuesIn(all_setups()),
                         [](const auto& test) { return test.param.name(); });

/// This rank's tokens of `c`.
struct Tokens {
  Tokens(const LayerCase& c, const Context& context)
      : x(rows_of(c, c.x, c.held(context.rank(), context.size()))), out(x.view().dtype(), x.view().shape()) {}
  Array x, out;
};

TEST_P(Inference, gives_the_same_bytes_with_bounded_and_exact_plans) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const LayerCase c({.dtype = dtype});
    expect_success(run_communicators(GetParam(), [&](const Communicator& communicator) {
      const Context context(communicator, {.threads = 1, .backend = fastest_backend()});
      const Tokens exact(c, context), bounded(c, context);
      MoeLayerOptions options = c.options();
      for (const Tokens* tokens : {&exact, &bounded}) {
        MoeLayer layer(context, options);
        c.fill(layer);
        layer.forward(context, tokens->x, tokens->out);
        options.bound = c.tokens();
      }
      const std::size_t bytes = exact.out.view().byte_size();
      EXPECT_TRUE(bytes == 0 || std::memcmp(exact.out.view().data(), bounded.out.view().data(), bytes) == 0);
    }));
  }
}

}  // namespace
}  // namespace expar::test
