// --trace as Perfetto would read it: a row for each rank, on one clock, with every phase and wait.
#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "tests/multirank/command.h"

namespace expar {
namespace {

using Json = nlohmann::json;

struct Shown {
  std::string name, category;
  std::int64_t start = 0, end = 0;  // nanoseconds
  Json arguments;
  std::vector<std::string> within;  // names of the spans around it, the outermost first
};

std::int64_t nanoseconds(const Json& microseconds) { return std::llround(microseconds.get<double>() * 1000); }

/// Each row in the order of its starts, outer spans before inner ones.
std::map<int, std::vector<Shown>> rows_of(const std::string& path) {
  const Json trace = Json::parse(contents(path), nullptr, false);
  EXPECT_TRUE(trace.is_object()) << path;
  std::map<int, std::vector<Shown>> rows;
  std::set<int> jobs;
  if (!trace.is_object()) return rows;
  for (const Json& event : trace["traceEvents"]) {
    jobs.insert(event["pid"].get<int>());
    if (event["ph"] == "M" && event["name"] == "thread_name") {
      EXPECT_EQ(event["args"]["name"], "rank " + std::to_string(event["tid"].get<int>()));
      EXPECT_EQ(rows.count(event["tid"]), 0u) << "a rank has one row";
      rows[event["tid"]];
    }
    if (event["ph"] != "X") continue;
    EXPECT_EQ(rows.count(event["tid"]), 1u) << "no row has this name: " << event;
    EXPECT_GE(event["dur"].get<double>(), 0) << event;
    const std::int64_t start = nanoseconds(event["ts"]);
    rows[event["tid"]].push_back({event["name"],
                                  event["cat"],
                                  start,
                                  start + nanoseconds(event["dur"]),
                                  event.value("args", Json::object()),
                                  {}});
  }
  EXPECT_EQ(jobs.size(), 1u);
  for (auto& [rank, row] : rows) {
    // A span is written at its end, so of two that start in the same nanosecond the later one is the outer one.
    std::reverse(row.begin(), row.end());
    std::stable_sort(row.begin(), row.end(), [](const Shown& a, const Shown& b) {
      return a.start != b.start ? a.start < b.start : a.end > b.end;
    });
  }
  return rows;
}

/// Finds what is around each span; spans that overlap otherwise are an error.
void nest(std::vector<Shown>& row) {
  std::vector<const Shown*> open;
  for (Shown& span : row) {
    while (!open.empty() && open.back()->end <= span.start && open.back()->end < span.end) open.pop_back();
    if (!open.empty()) {
      EXPECT_LE(span.end, open.back()->end) << span.name << " begins in " << open.back()->name << " and ends after it";
    }
    for (const Shown* around : open) span.within.push_back(around->name);
    open.push_back(&span);
  }
}

bool is_within(const Shown& span, const std::string& name) {
  return std::find(span.within.begin(), span.within.end(), name) != span.within.end();
}

std::vector<Shown> named(const std::vector<Shown>& row, const std::string& name) {
  std::vector<Shown> found;
  std::copy_if(row.begin(), row.end(), std::back_inserter(found), [&](const Shown& s) { return s.name == name; });
  return found;
}

void check_waits(const std::vector<Shown>& row, int rank, int ranks) {
  std::size_t waits = 0;
  for (const Shown& span : row) {
    if (span.category != "wait") continue;
    ++waits;
    const int peer = span.arguments.value("peer", -1);
    EXPECT_GE(peer, 0);
    EXPECT_LT(peer, ranks);
    EXPECT_NE(peer, rank);
    EXPECT_EQ(span.name, "wait for rank " + std::to_string(peer));
    EXPECT_NE(span.arguments.value("operation", ""), "");
    EXPECT_NE(span.arguments.value("what", ""), "");
  }
  EXPECT_GT(waits, 0u) << "ranks never start everything in the same instant";
}

constexpr int kSteps = 30;
const std::string kSmall = " --hidden 16 --inner 16 --experts 5 --context 4 --batch 40 --lr 0.01 --seed 3 --steps 30 ";

class TraceCommand : public TrainCommand {};

TEST_F(TraceCommand, shows_the_phases_and_waits_of_every_rank_of_a_training) {
  for (const std::string transport : {"shm", "threads"}) {
    const Json result = train(kSmall + "--ranks 2 --transport " + transport + " --trace " + path("trace"));
    auto rows = rows_of(path("trace"));
    ASSERT_EQ(rows.size(), 2u);
    std::map<std::string, double> sums;
    for (auto& [rank, row] : rows) {
      nest(row);
      EXPECT_EQ(named(row, "step").size(), std::size_t{kSteps});
      for (const std::string phase : {"route", "plan", "dispatch", "experts", "combine"}) {
        std::size_t forward = 0, backward = 0;
        for (const Shown& span : named(row, phase)) {
          if (!is_within(span, "step")) continue;
          EXPECT_EQ(span.category, "phase");
          (is_within(span, "backward") ? backward : forward) += 1;
          const std::string counted = phase == "plan" ? "dispatch" : phase;
          if (!is_within(span, "backward")) sums[counted] += static_cast<double>(span.end - span.start);
        }
        EXPECT_EQ(forward, std::size_t{kSteps * 2} * (phase == "plan" || phase == "experts" ? 1 : 2)) << phase;
        EXPECT_EQ(backward, phase == "plan" ? 0 : std::size_t{kSteps * 2}) << phase;
      }
      for (const std::string phase : {"backward", "optimizer"}) {
        std::size_t times = 0;
        for (const Shown& span : named(row, phase)) {
          if (is_within(span, "backward") || !is_within(span, "step")) continue;
          ++times;
          sums[phase] += static_cast<double>(span.end - span.start);
        }
        EXPECT_EQ(times, std::size_t{kSteps}) << phase;
      }
      EXPECT_FALSE(named(row, "held-out").empty());
      EXPECT_FALSE(named(row, "all_reduce").empty());
      check_waits(row, rank, 2);
    }
    for (const auto& [phase, sum] : sums) {
      EXPECT_NEAR(sum * 1e-6 / (2 * kSteps), result["phase_ms"].value(phase, -1.0), 1e-6) << phase;
    }
  }
}

TEST_F(TraceCommand, puts_all_ranks_on_one_clock) {
  train(kSmall + "--ranks 3 --trace " + path("trace"));
  auto rows = rows_of(path("trace"));
  ASSERT_EQ(rows.size(), 3u);
  const auto first = named(rows[0], "all_reduce");
  ASSERT_FALSE(first.empty());
  for (int rank = 1; rank < 3; ++rank) {
    const auto other = named(rows[rank], "all_reduce");
    ASSERT_EQ(other.size(), first.size());
    for (std::size_t i = 0; i < first.size(); ++i) {
      EXPECT_LT(first[i].start, other[i].end) << "nobody leaves a sum before all have entered";
      EXPECT_LT(other[i].start, first[i].end);
    }
  }
}

TEST_F(TraceCommand, changes_no_bits) {
  const Json plain = train(kSmall + "--ranks 3");
  const Json traced = train(kSmall + "--ranks 3 --trace " + path("trace"));
  EXPECT_EQ(traced["losses"].dump(), plain["losses"].dump());
  EXPECT_EQ(traced["heldout_bits_per_byte"].dump(), plain["heldout_bits_per_byte"].dump());
}

TEST_F(TraceCommand, shows_benchmarks_too) {
  const Finished finished = expar(
      "bench dispatch combine experts layer --train --tokens 32 --hidden 32 --inner 16 --experts 8 --topk 2 "
      "--seconds 0.02 --ranks 2 --trace " +
      path("trace"));
  EXPECT_EQ(finished.status, 0) << finished.err;
  auto rows = rows_of(path("trace"));
  ASSERT_EQ(rows.size(), 2u);
  for (auto& [rank, row] : rows) {
    nest(row);
    for (const std::string phase :
         {"route", "plan", "dispatch", "experts", "combine", "backward", "optimizer", "all_reduce", "barrier"}) {
      EXPECT_FALSE(named(row, phase).empty()) << phase;
    }
    check_waits(row, rank, 2);
  }
}

TEST_F(TraceCommand, shows_what_happened_until_an_error) {
  for (const std::string ranks : {"--ranks 2", "--ranks 2 --transport threads", "--ranks 1"}) {
    const Finished exploded = expar("train --text " + path("text") + " --hidden 8 --inner 8 --batch 16 --lr 1e30 " +
                                    ranks + " --trace " + path("failed"));
    EXPECT_EQ(exploded.status, 2) << exploded.err;
    EXPECT_NE(exploded.err.find("step "), std::string::npos) << exploded.err;
    auto rows = rows_of(path("failed"));
    EXPECT_EQ(rows.size(), ranks == "--ranks 1" ? 1u : 2u);
    for (auto& [rank, row] : rows) {
      nest(row);
      EXPECT_FALSE(named(row, "step").empty());
    }
    std::size_t files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(directory_)) {
      files += entry.path().filename().string().rfind("failed", 0) == 0;
    }
    EXPECT_EQ(files, 1u) << "the ranks' own files have become one";
    std::filesystem::remove(path("failed"));
  }
}

TEST_F(TraceCommand, refuses_what_it_cannot_do_before_any_work) {
  const struct {
    std::string arguments;
    int status;
    std::string says;
  } mistakes[] = {
      {"doctor --trace " + path("trace"), 2, "--trace does not go with doctor, which runs no ranks of its own"},
      {"launch --trace " + path("trace") + " -- true", 2, "--trace does not go with launch"},
      {"train --text " + path("text") + " --trace ''", 2, "--trace = '' is not the name of a file"},
      {"train --text " + path("text") + " --trace " + directory_, 7, "cannot write " + directory_ + ": Is a directory"},
      {"train --text " + path("text") + " --trace " + path("no/such"), 7, "No such file or directory"},
  };
  for (const auto& mistake : mistakes) {
    const Finished finished = expar(mistake.arguments);
    EXPECT_EQ(finished.status, mistake.status) << mistake.arguments << "\n" << finished.err;
    EXPECT_NE(finished.err.find(mistake.says), std::string::npos) << mistake.arguments << "\n" << finished.err;
    EXPECT_EQ(std::count(finished.err.begin(), finished.err.end(), '\n'), 1) << finished.err;
  }
}

}  // namespace
}  // namespace expar
