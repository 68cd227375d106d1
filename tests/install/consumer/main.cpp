// Four ranks, here threads of this process, share eight experts and run one MoE layer.
#include <expar/expar.h>

#include <cstdio>

int main() {
  expar::run_threads(4, [](expar::Communicator communicator) {
    const expar::Context context(communicator);
    expar::MoeLayer layer(context, {.hidden = 64, .inner = 128, .router = {.experts = 8, .topk = 2}});
    layer.initialise(/*seed=*/1, "moe");
    const expar::Array x(expar::DType::f32, {16, 64});
    const expar::Array out(expar::DType::f32, {16, 64});
    for (int i = 0; i < 16 * 64; ++i) x.as<float>()[i] = static_cast<float>(i % 7) - 3.0F;
    layer.forward(context, x, out);
    std::printf("rank %d of %d: out[0,0] = %f\n", context.rank(), context.size(), double{out.as<float>()[0]});
  });
}
