// The writer of the Trace Event Format.
#include "io/trace.h"

#include <chrono>
#include <string_view>

#include <nlohmann/json.hpp>

namespace expar::io {
namespace {

constexpr const char* kSeparator = ",\n";
constexpr int kJob = 1;  // the one "process" of the file; its "threads" are the ranks

/// With its quotes. Words may come from callers, so they may hold anything.
std::string json_string(std::string_view word) {
  return nlohmann::json(word).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

/// Microseconds, exact to the nanosecond: a double would make neighbours overlap.
std::string microseconds(std::chrono::nanoseconds time) {
  const std::string digits = std::to_string(1000 + time.count() % 1000);
  return std::to_string(time.count() / 1000) + "." + digits.substr(1);
}

std::string_view name(Span::Kind kind) {
  switch (kind) {
    case Span::Kind::phase:
      return "phase";
    case Span::Kind::operation:
      return "operation";
    case Span::Kind::wait:
      return "wait";
  }
  return "";
}

std::string title(const Span& span) {
  if (span.kind != Span::Kind::wait) return json_string(span.name);
  return json_string(span.peer >= 0 ? "wait for rank " + std::to_string(span.peer) : "wait");
}

std::string arguments(const Span& span) {
  if (span.kind != Span::Kind::wait) return {};
  std::string text = R"(,"args":{"operation":)" + json_string(span.name) + R"(,"what":)" + json_string(span.what);
  if (span.peer >= 0) text += R"(,"peer":)" + std::to_string(span.peer);
  return text + "}";
}

std::string place(int rank) { return R"("pid":)" + std::to_string(kJob) + R"(,"tid":)" + std::to_string(rank); }

std::string metadata(std::string_view what, int rank, const std::string& arguments) {
  return R"({"ph":"M","name":)" + json_string(what) + "," + place(rank) + R"(,"args":{)" + arguments + "}}";
}

std::string event(const Span& span, int rank) {
  return R"({"ph":"X","name":)" + title(span) + R"(,"cat":")" + std::string(name(span.kind)) + R"(",)" + place(rank) +
         R"(,"ts":)" + microseconds(span.start.time_since_epoch()) + R"(,"dur":)" +
         microseconds(span.end - span.start) + arguments(span) + "}";
}

/// A mark at the end of the row.
std::string left_out(const Trace& trace, int rank) {
  const auto end = trace.spans().empty() ? Span::Time{} : trace.spans().back().end;
  const std::string count = std::to_string(trace.left_out());
  return R"({"ph":"i","s":"t","name":)" + json_string(count + " later spans are left out") + "," + place(rank) +
         R"(,"ts":)" + microseconds(end.time_since_epoch()) + R"(,"args":{"left_out":)" + count + "}}";
}

}  // namespace

std::string trace_row(const Trace& trace, int rank) {
  const std::string number = std::to_string(rank);
  std::string row = metadata("thread_name", rank, R"("name":"rank )" + number + "\"") + kSeparator +
                    metadata("thread_sort_index", rank, R"("sort_index":)" + number);
  for (const Span& span : trace.spans()) row += kSeparator + event(span, rank);
  if (trace.left_out() > 0) row += kSeparator + left_out(trace, rank);
  return row;
}

std::string trace_file(const std::string& job, std::span<const std::string> rows) {
  std::string text =
      "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n" + metadata("process_name", 0, R"("name":)" + json_string(job));
  for (const std::string& row : rows) text += kSeparator + row;
  return text + "\n]}\n";
}

}  // namespace expar::io
