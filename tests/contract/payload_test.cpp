// Payloads: every row, a rank's own included, arrives as the kernels round it, in exact plans and in bounded ones.
#include <gtest/gtest.h>

#include <cstring>

#include <expar/collectives.h>

#include "tests/contract/share.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

class Payload : public EveryWay {};

/// x of one token of `w`, no whole numbers, so that each payload rounds some of them.
void fill(const Workload& w, int rank, std::int64_t token, const Tensor& row) {
  for (std::int64_t h = 0; h < w.hidden; ++h) {
    set(row, h, w.x(rank, token, h) * 0.37F - 1.0F / static_cast<float>(1 + h));
  }
}

/// What an expert must find of the token, computed by itself.
Array arrived(const Context& context, const Workload& w, int rank, std::int64_t token, DType dtype, DType payload) {
  Array row(dtype, Shape{1, w.hidden}), back(dtype, Shape{1, w.hidden});
  fill(w, rank, token, row);
  std::vector<float> way(static_cast<std::size_t>(payload_bytes(payload, w.hidden)) / sizeof(float));
  context.kernels().quantise(
      {.payload = payload, .dtype = dtype, .count = 1, .width = w.hidden, .rows = row.view().data(), .out = way.data()},
      context.pool());
  context.kernels().dequantise({.payload = payload,
                                .dtype = dtype,
                                .count = 1,
                                .width = w.hidden,
                                .rows = way.data(),
                                .out = back.view().data()},
                               context.pool());
  return back;
}

void check(const Context& context, const Workload& w, DType dtype, DType payload, std::int64_t bound) {
  const Share share(w, context.rank(), dtype);
  for (std::int64_t t = 0; t < share.x.view().size(0); ++t) fill(w, context.rank(), t, share.x.view().rows(t, 1));
  const Plan plan = plan_of(context, w, share, bound);
  const DispatchOptions options{.layout = Layout::expert_major, .payload = payload};
  const Inbox inbox = dispatch(context, share.x, share.weights, plan, options);
  const std::size_t bytes = static_cast<std::size_t>(w.hidden) * size_of(dtype);
  const ExpertRange local = inbox.plan().local();
  const auto by_expert = rows_by_expert(w);
  for (std::int64_t e = 0; e < local.count; ++e) {
    std::int64_t row = inbox.offsets()[static_cast<std::size_t>(e)];
    for (const auto& [source, token, slot] : by_expert[static_cast<std::size_t>(local.first + e)]) {
      const Array wanted = arrived(context, w, source, token, dtype, payload);
      const auto* packed = inbox.packed().bytes() + static_cast<std::size_t>(row) * bytes;
      require(bytes == 0 || std::memcmp(row_bytes(inbox, row), wanted.view().data(), bytes) == 0, "a row");
      require(bytes == 0 || std::memcmp(packed, wanted.view().data(), bytes) == 0, "a packed row");
      ++row;
    }
  }
}

TEST_P(Payload, brings_rows_as_the_payload_rounds_them) {
  run(GetParam(), [](const Context& context) {
    for (const std::size_t i : {0U, 1U, 2U, 3U, 7U, 10U}) {
      const Workload w = workloads(context.size())[i];
      for (const DType payload : {DType::int8, DType::fp8_e4m3, DType::f16, DType::bf16}) {
        try {
          check(context, w, DType::f32, payload, 0);
          if (payload != DType::bf16) check(context, w, DType::bf16, payload, 11);
        } catch (const std::runtime_error& error) {
          throw std::runtime_error(w.name + " as " + std::string(name(payload)) + ": " + error.what());
        }
      }
    }
  });
}

TEST_P(Payload, refuses_payloads_that_are_none_or_differ) {
  run(GetParam(), [](const Context& context) {
    const std::vector<std::int32_t> ids(3, 1);
    const Plan plan = make_plan(context, ConstTensor(ids.data(), Shape{3, 1}), {.experts = 4});
    const Array x(DType::f32, Shape{3, 4}), low(DType::bf16, Shape{3, 4});
    const auto expect = [&](const Array& rows, DType payload, ErrorCode code, const std::string& part) {
      const Error error = error_of([&] { dispatch(context, rows, {}, plan, {.payload = payload}); });
      require(error.code() == code && error.message().find(part) != std::string::npos, error.what());
    };
    expect(x, DType::int32, ErrorCode::bad_argument, "rows of f32 do not travel as int32, but as");
    expect(low, DType::f32, ErrorCode::bad_argument, "rows of bf16 do not travel as f32, but as");
    if (context.size() > 1) {
      expect(x, context.rank() == 1 ? DType::int8 : DType::f16, ErrorCode::mismatch, "payload");
    }
    barrier(context);
  });
}

INSTANTIATE_TEST_SUITE_P(Ways, Payload, testing::ValuesIn(every_way()), way_name);

}  // namespace
}  // namespace expar::test
