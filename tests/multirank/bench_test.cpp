// The benchmarks' own checks: they must see what is wrong, and call right what is right.
#include <cmath>
#include <set>

#include <expar/expar.h>
#include <gtest/gtest.h>

#include "bench/oracle.h"
#include "bench/routes.h"
#include "bench/timing.h"
#include "bench/workload.h"

namespace expar::bench {
namespace {

Options small() {
  Options options;
  options.tokens = 7;
  options.hidden = 20;
  options.inner = 12;
  options.experts = 6;
  options.topk = 3;
  return options;
}

TEST(Bench, sees_every_wrong_element_of_an_inbox) {
  run_threads(2, [](const Communicator& communicator) {
    const Context context(communicator);
    const Workload workload(context, small());
    const Plan plan = make_plan(context, workload.ids(), {.experts = small().experts});
    const Inbox inbox = dispatch(context, workload.x(), workload.weights(), plan);
    EXPECT_EQ(count_wrong(workload, inbox), 0);

    // The reader's own memory: breaking it harms nobody else.
    ASSERT_GT(inbox.rows().elements(), 0);
    auto* element = static_cast<bf16*>(const_cast<void*>(inbox.rows().data()));
    std::int64_t uses = 0;
    for (const RowRef& ref : inbox.refs()) uses += ref.base == 1 && ref.row == 0;
    element->bits ^= 1;
    EXPECT_EQ(count_wrong(workload, inbox), uses);
    element->bits ^= 1;
    EXPECT_EQ(count_wrong(workload, inbox), 0);
  });
}

TEST(Bench, takes_no_row_of_another_token_for_the_right_one) {
  float a[16], b[16];
  for (std::uint64_t row = 0; row < 64; ++row) {
    fill_row(row, DType::f32, 16, a);
    fill_row(row + 1, DType::f32, 16, b);
    EXPECT_GT(count_wrong(a, b, DType::f32, 16), 8) << "row " << row;
    for (const float value : a) EXPECT_NE(value, 0.0F);
    for (const float value : a) EXPECT_EQ(static_cast<float>(bf16(value)), value);
  }
}

TEST(Bench, allows_rounding_and_nothing_more) {
  Expected expected{.value = {1.0, -2.0, 0.0}, .square = {4.0, 4.0, 4.0}};
  EXPECT_EQ(count_wrong({1.01, -2.01, 0.01}, expected, DType::bf16), 0);
  EXPECT_EQ(count_wrong({1.01, -2.01, 0.01}, expected, DType::f32), 3);
  EXPECT_EQ(count_wrong({1.2, -2.0, std::nan("")}, expected, DType::bf16), 2);
}

TEST(Bench, reads_slices_of_the_results_of_all_tokens_in_a_hidden_partition) {
  Options options = small();
  options.seconds = 0.01;
  const std::vector<std::int32_t> ids = make_routes(options, 3 * options.tokens);
  for (const bool hidden : {false, true}) {
    options.hidden_partition = hidden;
    std::int64_t bytes = 0;
    for (int rank = 0; rank < 3; ++rank) {
      const std::int64_t width = hidden ? (rank + 1) * 20 / 3 - rank * 20 / 3 : 20;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        const bool reads = hidden || static_cast<std::int64_t>(i) / (7 * 3) == rank;
        if (reads && owner_of(ids[i], 3, 6) != rank) bytes += width * 2;
      }
    }
    run_threads(3, [&](const Communicator& communicator) {
      const std::vector<Row> rows = measure("combine", Context(communicator), options);
      ASSERT_EQ(rows.size(), 1u);
      EXPECT_EQ(rows[0].wrong, 0);
      EXPECT_EQ(rows[0].bytes, bytes);
    });
  }
}

TEST(Bench, routes_each_token_to_different_experts) {
  for (const char* routes : {"uniform", "zipf:2", "hot:1:1", "hot:6:0.5"}) {
    Options options = small();
    options.routes = routes;
    const std::vector<std::int32_t> ids = make_routes(options, 100);
    for (std::size_t t = 0; t < 100; ++t) {
      const std::set<std::int32_t> chosen(ids.begin() + static_cast<std::ptrdiff_t>(t * 3),
                                          ids.begin() + static_cast<std::ptrdiff_t>(t * 3 + 3));
      EXPECT_EQ(chosen.size(), 3u) << routes << ", token " << t;
      EXPECT_GE(*chosen.begin(), 0);
      EXPECT_LT(*chosen.rbegin(), 6);
    }
  }
}

TEST(Bench, makes_experts_as_hot_as_asked) {
  Options options = small();
  options.experts = 100;
  options.topk = 1;
  options.routes = "hot:2:0.75";
  std::int64_t hot = 0;
  for (const std::int32_t id : make_routes(options, 4000)) hot += id < 2;
  EXPECT_NEAR(static_cast<double>(hot) / 4000, 0.75, 0.04);
}

TEST(Bench, finds_the_median_and_the_tail) {
  EXPECT_EQ(median({3, 1, 2}), 2);
  EXPECT_EQ(percentile({5, 4, 3, 2, 1}, 0.99), 5);
  EXPECT_EQ(percentile({7}, 0.01), 7);
}

}  // namespace
}  // namespace expar::bench
