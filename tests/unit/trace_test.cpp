// Traces: what is kept, what is left out, and the file that is made of them.
#include <expar/trace.h>

#include <chrono>
#include <string>
#include <thread>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "io/trace.h"

namespace expar {
namespace {

using std::chrono::nanoseconds;

Span::Time at(std::int64_t ns) { return Span::Time(nanoseconds(ns)); }

nlohmann::json events(std::vector<std::string> rows, const std::string& job = "job") {
  return nlohmann::json::parse(io::trace_file(job, rows)).at("traceEvents");
}

/// The events of one kind ("X", "M", "i").
nlohmann::json of_kind(const nlohmann::json& all, const std::string& kind) {
  nlohmann::json found = nlohmann::json::array();
  for (const auto& event : all) {
    if (event["ph"] == kind) found.push_back(event);
  }
  return found;
}

TEST(Trace, keeps_words_that_are_gone) {
  Trace trace;
  for (int layer = 0; layer < 3; ++layer) {
    const std::string name = "the name of layer " + std::to_string(layer) + ", too long to lie in a string";
    const Phase phase(&trace, name);
  }
  ASSERT_EQ(trace.spans().size(), 3u);
  EXPECT_EQ(trace.spans()[0].name, "the name of layer 0, too long to lie in a string");
  EXPECT_EQ(trace.spans()[2].name, "the name of layer 2, too long to lie in a string");
}

TEST(Trace, counts_what_it_has_no_room_for) {
  Trace trace(2);
  for (const char* name : {"first", "second", "third", "fourth", "fifth"}) const Phase phase(&trace, name);
  ASSERT_EQ(trace.spans().size(), 2u);
  EXPECT_EQ(trace.spans()[1].name, "second");
  EXPECT_EQ(trace.left_out(), 3);
  const nlohmann::json marks = of_kind(events({io::trace_row(trace, 0)}), "i");
  ASSERT_EQ(marks.size(), 1u);
  EXPECT_EQ(marks[0]["name"], "3 later spans are left out");
  EXPECT_EQ(marks[0]["args"]["left_out"], 3);
}

TEST(Phase, is_one_measurement_for_the_trace_and_for_the_sum) {
  Trace trace;
  double milliseconds = 1;
  {
    const Phase phase(&trace, "work", &milliseconds);
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  }
  ASSERT_EQ(trace.spans().size(), 1u);
  const std::chrono::duration<double, std::milli> span = trace.spans()[0].end - trace.spans()[0].start;
  EXPECT_GE(span.count(), 3);
  EXPECT_EQ(milliseconds, 1 + span.count());
  {
    const Phase phase(nullptr, "work", &milliseconds);
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  }
  EXPECT_GE(milliseconds, 4 + span.count());
  EXPECT_EQ(trace.spans().size(), 1u);
}

TEST(Phase, ends_where_an_exception_passes) {
  Trace trace;
  try {
    const Phase outer(&trace, "outer");
    const Phase inner(&trace, "inner");
    throw 1;
  } catch (int) {
  }
  ASSERT_EQ(trace.spans().size(), 2u);
  EXPECT_EQ(trace.spans()[0].name, "inner");
  EXPECT_EQ(trace.spans()[1].name, "outer");
  EXPECT_LE(trace.spans()[1].start, trace.spans()[0].start);
  EXPECT_GE(trace.spans()[1].end, trace.spans()[0].end);
}

TEST(TraceFile, has_a_named_row_for_each_rank) {
  Trace none, some;
  some.add({.name = "route", .start = at(5), .end = at(6)});
  const nlohmann::json all = events({io::trace_row(none, 0), io::trace_row(some, 1)}, "expar train");
  std::vector<std::string> rows(2);
  for (const auto& event : of_kind(all, "M")) {
    if (event["name"] == "thread_name") rows.at(event["tid"].get<std::size_t>()) = event["args"]["name"];
    EXPECT_TRUE(event["name"] != "process_name" || event["args"]["name"] == "expar train") << event;
    EXPECT_EQ(event["pid"], all[0]["pid"]);
  }
  EXPECT_EQ(rows, (std::vector<std::string>{"rank 0", "rank 1"}));
  const nlohmann::json spans = of_kind(all, "X");
  ASSERT_EQ(spans.size(), 1u);
  EXPECT_EQ(spans[0]["tid"], 1);
}

TEST(TraceFile, says_for_what_and_for_whom_a_rank_waits) {
  Trace trace;
  trace.add(
      {.kind = Span::Kind::wait, .name = "dispatch", .what = "its rows", .peer = 3, .start = at(1), .end = at(2)});
  trace.add({.kind = Span::Kind::wait, .name = "join", .what = "all", .start = at(3), .end = at(4)});
  const nlohmann::json spans = of_kind(events({io::trace_row(trace, 0)}), "X");
  EXPECT_EQ(spans[0]["name"], "wait for rank 3");
  EXPECT_EQ(spans[0]["cat"], "wait");
  EXPECT_EQ(spans[0]["args"], nlohmann::json::parse(R"({"operation":"dispatch","what":"its rows","peer":3})"));
  EXPECT_EQ(spans[1]["name"], "wait");
  EXPECT_FALSE(spans[1]["args"].contains("peer"));
}

TEST(TraceFile, is_exact_to_the_nanosecond_after_years) {
  Trace trace;
  trace.add({.name = "short", .start = at(123456789012345001), .end = at(123456789012345008)});
  const std::string row = io::trace_row(trace, 0);
  EXPECT_NE(row.find(R"("ts":123456789012345.001,"dur":0.007)"), std::string::npos) << row;
}

TEST(TraceFile, stays_one_whatever_words_it_gets) {
  Trace trace;
  const std::string odd = "\"},{\"\\\n\x01\xff";
  trace.add({.name = odd, .start = at(1), .end = at(2)});
  trace.add({.kind = Span::Kind::wait, .name = odd, .what = odd, .peer = 1, .start = at(1), .end = at(2)});
  const nlohmann::json all = events({io::trace_row(trace, 0)}, odd);
  EXPECT_EQ(of_kind(all, "X").size(), 2u);
  EXPECT_EQ(of_kind(all, "X")[0]["name"], "\"},{\"\\\n\x01\xef\xbf\xbd") << "what is no UTF-8 is replaced";
}

}  // namespace
}  // namespace expar
