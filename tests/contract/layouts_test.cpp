// Callers' own kernels: each layout of the rows holds what it says, and combine finds results that are written
// likewise.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include <expar/permute.h>

#include "tests/contract/experts.h"
#include "tests/contract/ways.h"

namespace expar::test {
namespace {

constexpr Layout kPacked[] = {Layout::expert_major, Layout::padded, Layout::rank_major};

class Layouts : public EveryWay {};

float element(const ConstTensor& packed, std::int64_t row, std::int64_t width, std::int64_t h) {
  return value(packed, row * width + h);
}

/// The rows of `expert`, in the order in which this layout holds them.
std::vector<std::int64_t> packed_rows(const Inbox& inbox, std::int64_t expert) {
  std::vector<std::int64_t> rows;
  for (const Stretch& s : stretches(inbox)) {
    for (std::int64_t i = 0; s.expert == expert && i < s.count; ++i) rows.push_back(s.first + i);
  }
  return rows;
}

void check_packed(const Workload& w, const Inbox& inbox) {
  std::vector<bool> taken(static_cast<std::size_t>(inbox.offsets().back()));
  const auto by_expert = rows_by_expert(w);
  for (std::int64_t e = 0; e < inbox.plan().local().count; ++e) {
    const auto& expected = by_expert[static_cast<std::size_t>(inbox.plan().local().first + e)];
    const auto rows = packed_rows(inbox, e);
    require_equal(rows.size(), expected.size(), "rows of an expert");
    for (std::size_t i = 0; i < rows.size(); ++i) {
      require(!taken[static_cast<std::size_t>(rows[i])], "a row belongs to two experts");
      taken[static_cast<std::size_t>(rows[i])] = true;
      for (std::int64_t h = 0; h < w.hidden; ++h) {
        require_equal(element(inbox.packed(), rows[i], w.hidden, h), w.x(expected[i].source, expected[i].token, h),
                      "an element");
      }
    }
  }
  for (std::size_t row = 0; row < taken.size(); ++row) {
    for (std::int64_t h = 0; !taken[row] && h < w.hidden; ++h)
      require_equal(element(inbox.packed(), static_cast<std::int64_t>(row), w.hidden, h), 0.0F, "padding");
  }
}

std::int64_t most_rows(const Plan& plan) {
  const auto totals = plan.expert_totals();
  return *std::max_element(totals.begin(), totals.end());
}

TEST_P(Layouts, packs_rows_in_each_layout_and_finds_the_results_there) {
  run(GetParam(), [](const Context& context) {
    for (const Workload& w : workloads(context.size())) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        Share share(w, context.rank(), dtype);
        const std::int64_t alignment = dtype == DType::bf16 ? 8 : 1;
        const Plan plan = make_plan(context, share.id_tensor(w),
                                    {.experts = w.experts, .first_experts = w.first_experts, .alignment = alignment});
        for (const Layout layout : kPacked) {
          const DispatchOptions options{.layout = layout, .capacity = most_rows(plan) + 2};
          const Inbox inbox = dispatch(context, share.x, share.weights, plan, options);
          check_packed(w, inbox);
          Outbox y = make_outbox(context, inbox, w.hidden, dtype);
          multiply(inbox, y);
          combine(context, plan, y, ConstTensor(share.weights), share.out);
          check_out(w, share, context.rank(), true);
        }
      }
    }
  });
}

TEST_P(Layouts, brings_values_home_from_each_layout) {
  run(GetParam(), [](const Context& context) {
    const Workload w = workloads(context.size())[2];
    Share share(w, context.rank(), DType::f32);
    const Plan plan = make_plan(context, share.id_tensor(w), {.experts = w.experts, .first_experts = w.first_experts});
    for (const Layout layout : kPacked) {
      const DispatchOptions options{.layout = layout, .capacity = most_rows(plan)};
      const Inbox inbox = dispatch(context, share.x, share.weights, plan, options);
      Outbox values = make_outbox(context, inbox, 1, DType::f32);
      for (const auto& [expert, first, count] : stretches(inbox)) {
        for (std::int64_t row = first; row < first + count; ++row)
          values.rows().as<float>()[row] = static_cast<float>(inbox.plan().local().first + expert);
      }
      Array out(DType::f32, Shape{plan.tokens(), w.topk, 1});
      fetch_slots(context, plan, values, out);
      for (std::size_t i = 0; i < share.ids.size(); ++i)
        require_equal(out.as<float>()[i], static_cast<float>(share.ids[i]), "the expert of a slot");
    }
  });
}

TEST_P(Layouts, permutes_rank_major_rows_into_expert_major_ones_and_back) {
  run(GetParam(), [](const Context& context) {
    for (const Workload& w : workloads(context.size())) {
      const Share share(w, context.rank(), DType::f32);
      const Plan plan =
          make_plan(context, share.id_tensor(w), {.experts = w.experts, .first_experts = w.first_experts});
      const Inbox by_rank = dispatch(context, share.x, {}, plan, {.layout = Layout::rank_major});
      const Inbox by_expert = dispatch(context, share.x, {}, plan, {.layout = Layout::expert_major});
      std::vector<std::int64_t> counts;
      for (std::size_t i = 1; i < by_rank.offsets().size(); ++i)
        counts.push_back(by_rank.offsets()[i] - by_rank.offsets()[i - 1]);
      const ExpertMajor order = expert_major(counts, context.size());
      require(std::ranges::equal(order.rows, plan.rows()), "rows of an expert");
      const Array there(DType::f32, by_rank.packed().shape()), back(DType::f32, by_rank.packed().shape());
      permute_rows(by_rank.packed(), order.indices, there);
      unpermute_rows(there, order.indices, back);
      const std::size_t bytes = back.view().byte_size();
      require(bytes == 0 || std::memcmp(there.view().data(), by_expert.packed().data(), bytes) == 0, "permuted");
      require(bytes == 0 || std::memcmp(back.view().data(), by_rank.packed().data(), bytes) == 0, "back");
    }
  });
}

TEST_P(Layouts, refuses_a_capacity_that_is_too_small_and_layouts_that_differ) {
  run(GetParam(), [](const Context& context) {
    const std::vector<std::int32_t> ids{2, 2, 2};
    const Plan plan = make_plan(context, ConstTensor(ids.data(), Shape{3, 1}), {.experts = 5});
    const Array x(DType::f32, Shape{3, 4});
    const Error error = error_of([&] { dispatch(context, x, {}, plan, {.layout = Layout::padded, .capacity = 2}); });
    require(error.code() == ErrorCode::bad_argument, error.what());
    require(error.message() == "expert 2 has " + std::to_string(3 * context.size()) +
                                   " rows, the padded layout a capacity of 2: give it at least that many",
            error.message());
    if (context.size() == 1) return;

    const bool odd = context.rank() == context.size() - 1;
    const DispatchOptions options{.layout = Layout::padded, .capacity = odd ? 100 : 99};
    require(error_of([&] { dispatch(context, x, {}, plan, options); }).code() == ErrorCode::mismatch, "capacities");
    const Inbox inbox = dispatch(context, x, {}, plan, {.layout = Layout::rank_major});
    Outbox y = odd ? make_outbox(context, plan, 4, DType::f32) : make_outbox(context, inbox, 4, DType::f32);
    const Array out(DType::f32, Shape{3, 4});
    require(error_of([&] { combine(context, plan, y, unweighted, out); }).code() == ErrorCode::mismatch, "outboxes");
  });
}

INSTANTIATE_TEST_SUITE_P(Ways, Layouts, testing::ValuesIn(every_way()), way_name);

}  // namespace
}  // namespace expar::test
