// The list of benchmarks, and the options that none of them can take.
#include "bench/bench.h"

#include <array>

#include "bench/routes.h"
#include "bench/timing.h"
#include "io/routes.h"

namespace expar::bench {
namespace {

struct Entry {
  const char* name;
  std::vector<Row> (*measure)(const Parallel&, const Options&);
};

constexpr std::array<Entry, 5> kEntries{{{"barrier", measure_barrier},
                                         {"dispatch", measure_dispatch},
                                         {"combine", measure_combine},
                                         {"experts", measure_experts},
                                         {"layer", measure_layer}}};

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::bad_argument, message); }

std::string shown(const char* flag, std::int64_t value) { return std::string(flag) + " = " + std::to_string(value); }

void match_file(const io::Routes& file, Options& options, bool experts_given, bool topk_given) {
  if (experts_given && options.experts != file.experts) {
    refuse(shown("--experts", options.experts) + ", but " + options.routes + " has " + std::to_string(file.experts));
  }
  if (topk_given && options.topk != file.topk) {
    refuse(shown("--topk", options.topk) + ", but " + options.routes + " has " + std::to_string(file.topk));
  }
  options.experts = file.experts;
  options.topk = file.topk;
}

}  // namespace

const std::vector<std::string>& names() {
  static const std::vector<std::string> all = [] {
    std::vector<std::string> list;
    for (const Entry& entry : kEntries) list.emplace_back(entry.name);
    return list;
  }();
  return all;
}

void check(Options& options, bool experts_given, bool topk_given) {
  check_dims(options.mesh);
  const RouteSource source = parse_routes(options.routes);
  if (source.kind == RouteSource::Kind::file) {
    match_file(io::read_routes(source.path, 0), options, experts_given, topk_given);
  }
  if (options.topk > options.experts) {
    refuse(shown("--topk", options.topk) + " is above " + shown("--experts", options.experts));
  }
  if (source.kind == RouteSource::Kind::hot && source.hot > options.experts) {
    refuse("--routes = '" + options.routes + "' has more hot experts than " + shown("--experts", options.experts));
  }
}

std::vector<Row> measure(const std::string& what, const Context& context, const Options& options) {
  for (const Entry& entry : kEntries) {
    if (what == entry.name) return entry.measure(Parallel(context, options.mesh), options);
  }
  refuse("no benchmark is called '" + what + "'");
}

std::vector<Row> measure_barrier(const Parallel& ranks, const Options& options) {
  const Context& context = ranks.all;
  std::int64_t wrong = 0;
  std::vector<std::int64_t> entered, left;
  const auto now = [] { return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count(); };
  const Times times = measure_rounds(context, options.seconds, {{nullptr, [&] {
                                                                   entered.push_back(now());
                                                                   barrier(context);
                                                                   left.push_back(now());
                                                                 }}});
  // Nobody may leave before the last has entered; the ranks of one host have one clock.
  const std::vector<std::int64_t> all = gather_all(context, entered);
  for (std::size_t i = 0; i < all.size(); ++i) wrong += left[i % left.size()] < all[i];
  Row row;
  row.what = "barrier";
  row.p50_us = median(times[0]);
  row.p99_us = percentile(times[0], 0.99);
  row.wrong = sum_over_ranks(context, wrong);
  row.routed = false;
  return {row};
}

}  // namespace expar::bench
