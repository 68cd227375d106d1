// Says hello from any launcher: joins the other ranks, sends 60 tokens to 8 experts and back, and prints from rank 0 a
// hash of all results. The hash is the same for any number of ranks.
//
//   expar launch -n 4 -- hello_ranks        mpirun -n 4 hello_ranks
//   torchrun --nproc-per-node 4 --no-python hello_ranks        srun -n 4 hello_ranks
#include <expar/expar.h>

#include <cstdint>
#include <cstdio>

namespace {

constexpr std::int64_t kTokens = 60, kTopk = 2, kExperts = 8, kHidden = 16;

/// Expert e multiplies by e + 1: enough to see that every token was where it belongs.
void run_experts(const expar::Inbox& inbox, expar::Outbox& y) {
  const expar::Plan& plan = inbox.plan();
  for (std::int64_t e = 0; e < plan.local().count; ++e) {
    const auto local = static_cast<std::size_t>(e);
    for (std::int64_t i = plan.offsets()[local] * kHidden; i < plan.offsets()[local + 1] * kHidden; ++i) {
      y.rows().as<float>()[i] = inbox.packed().as<float>()[i] * static_cast<float>(plan.local().first + e + 1);
    }
  }
}

std::uint64_t hash_of(const expar::Array& values) {  // FNV-1a
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const std::byte byte : std::span(values.view().bytes(), values.view().byte_size())) {
    hash = (hash ^ static_cast<std::uint64_t>(byte)) * 0x100000001b3;
  }
  return hash;
}

void say_hello() {
  const expar::Context context(expar::init());
  const std::int64_t first = context.rank() * kTokens / context.size();
  const std::int64_t tokens = (context.rank() + 1) * kTokens / context.size() - first;

  const expar::Array x(expar::DType::f32, {tokens, kHidden}), out(expar::DType::f32, {tokens, kHidden});
  const expar::Array ids(expar::DType::int32, {tokens, kTopk}), weights(expar::DType::f32, {tokens, kTopk});
  for (std::int64_t i = 0; i < tokens * kHidden; ++i)
    x.as<float>()[i] = 1 / static_cast<float>(first * kHidden + i + 1);
  for (std::int64_t i = 0; i < tokens * kTopk; ++i) {
    ids.as<std::int32_t>()[i] = static_cast<std::int32_t>((first * kTopk + i) * 5 % kExperts);
    weights.as<float>()[i] = 1 / static_cast<float>(i % kTopk + 2);
  }

  const expar::Plan plan = expar::make_plan(context, ids, {.experts = kExperts});
  const expar::Inbox inbox = expar::dispatch(context, x, weights, plan, {.layout = expar::Layout::expert_major});
  expar::Outbox y = expar::make_outbox(context, plan, kHidden, expar::DType::f32);
  run_experts(inbox, y);
  expar::combine(context, plan, y, weights, out);

  const expar::Array all(expar::DType::f32, {kTokens, kHidden});
  expar::all_gather(context, out, all);
  if (context.rank() != 0) return;
  std::printf("hello from %d ranks: %d tokens came back, hash %016llx\n", context.size(), static_cast<int>(kTokens),
              static_cast<unsigned long long>(hash_of(all)));
}

}  // namespace

int main() {
  try {
    say_hello();
    return 0;
  } catch (const expar::Error& error) {
    expar::report_error(error);  // under `expar launch`: so that it can tell the cause from what follows
    std::fprintf(stderr, "hello_ranks: %s\n", error.what());
    return expar::exit_code(error.code());
  }
}
