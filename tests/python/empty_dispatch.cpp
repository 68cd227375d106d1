// Prints the nanoseconds that a dispatch of no tokens takes, called from C++: what python/tests/cost_test.py compares
// with.
#include <expar/expar.h>

#include <chrono>
#include <cstdio>

int main() {
  expar::run_threads(1, [](expar::Communicator communicator) {
    constexpr int kCalls = 20000;
    const expar::Context context(communicator, {.threads = 1});
    const expar::Array x(expar::DType::f32, {0, 8}), ids(expar::DType::int32, {0, 1});
    const expar::Plan plan = expar::make_plan(context, ids, {.experts = 4});
    for (int i = 0; i < 1000; ++i) expar::dispatch(context, x, {}, plan);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) expar::dispatch(context, x, {}, plan);
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    std::printf("%f\n", took.count() / kCalls);
  });
}
