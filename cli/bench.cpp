// expar bench: the flags of the benchmarks, and their rows as a table and as JSON.
#include <algorithm>
#include <cstdio>
#include <iterator>
#include <memory>

#include "bench/bench.h"
#include "cli/machine.h"
#include "cli/options.h"
#include "cli/output.h"
#include "cli/verbs.h"

namespace expar::cli {
namespace {

struct Flags {
  std::vector<std::string> what;
  bench::Options options;
  std::string dtype = "bf16";
  std::string activation = "swiglu";
  std::string layout = "indexed";
  std::string partition = "none";
  std::string mesh;
  int late = 0;  // microseconds
  const CLI::Option* experts = nullptr;
  const CLI::Option* topk = nullptr;
  const CLI::Option* routes = nullptr;
};

std::vector<std::string> layout_names() {
  std::vector<std::string> names;
  for (const Layout layout : kLayouts) names.emplace_back(name(layout));
  return names;
}

std::vector<std::string> activation_names() {
  std::vector<std::string> names;
  for (const NamedActivation& named : kActivations) names.emplace_back(named.name);
  return names;
}

void add_flags(CLI::App& app, Flags& flags) {
  bench::Options& o = flags.options;
  const auto size = whole_number(1, std::int64_t{1} << 24);
  app.add_option("what", flags.what, "barrier, dispatch, combine, experts, layer; one or more")
      ->check(one_of(bench::names()));
  app.add_option("--tokens", o.tokens, "tokens of each rank (default 1024)")->check(size);
  app.add_option("--hidden", o.hidden, "hidden size (default 2048)")->check(size);
  app.add_option("--inner", o.inner, "inner size of the experts (default 768)")->check(size);
  flags.experts = app.add_option("--experts", o.experts, "experts (default 64)")->check(size);
  flags.topk = app.add_option("--topk", o.topk, "experts of each token (default 8)")->check(size);
  app.add_option("--dtype", flags.dtype, "f32 or bf16 (default bf16)")->check(one_of({"f32", "bf16"}));
  app.add_option("--activation", flags.activation, joined(activation_names()) + " (default swiglu)")
      ->check(one_of(activation_names()));
  app.add_flag("--bias", o.bias, "experts with biases");
  app.add_flag("--train", o.train, "layer: also a training step with AdamW");
  app.add_option("--batches", o.batches,
                 "layer: cut each rank's tokens in so many, one after the other and in flight together (default 1)")
      ->check(whole_number(1, 64));
  app.add_option("--late", flags.late, "with --batches: how late the last rank is for each, in us (default 0)")
      ->check(whole_number(0, 1000000));
  app.add_option("--layout", flags.layout, "dispatch: indexed, expert_major, padded or rank_major (default indexed)")
      ->check(one_of(layout_names()));
  app.add_option("--partition", flags.partition,
                 "combine: hidden, all ranks have the tokens of all and each gets its slice of the hidden size "
                 "(default none)")
      ->check(one_of({"none", "hidden"}));
  app.add_option("--mesh", flags.mesh,
                 "dispatch, combine, layer: how ranks share the experts, like dp=2,ep=2,tp=2: replicas, whole experts, "
                 "slices of them (default: ep alone)");
  app.add_option("--seconds", o.seconds, "time to spend on each row (default 2)")->check(number_above(0));
  flags.routes = app.add_option("--routes", o.routes,
                                "uniform, zipf:A, hot:N:F (the first choice is with chance F one of N experts), or a "
                                "recorded FILE (default uniform)");
}

void check_flags(Flags& flags) {
  if (flags.what.empty()) {
    throw Error(ErrorCode::bad_argument, "name what to measure: " + joined(bench::names()));
  }
  bench::Options& o = flags.options;
  o.dtype = parse_dtype(flags.dtype);
  for (const NamedActivation& named : kActivations) {
    if (named.name == flags.activation) o.activation = named.activation, o.numbers = named.numbers;
  }
  o.layout = *std::find_if(std::begin(kLayouts), std::end(kLayouts), [&](Layout l) { return name(l) == flags.layout; });
  o.hidden_partition = flags.partition == "hidden";
  if (!flags.mesh.empty()) o.mesh = parse_mesh(flags.mesh);
  o.late = std::chrono::microseconds(flags.late);
  if (flags.late > 0 && o.batches == 1) {
    throw Error(ErrorCode::bad_argument, "--late goes with --batches of 2 or more");
  }
  if (o.batches > o.tokens) {
    throw Error(ErrorCode::bad_argument, "--batches " + std::to_string(o.batches) + " is more than the " +
                                             std::to_string(o.tokens) + " tokens of each rank");
  }
  bench::check(o, flags.experts->count() > 0, flags.topk->count() > 0);
  if (o.hidden_partition && !o.mesh.empty()) {
    throw Error(ErrorCode::bad_argument,
                "--mesh does not go with --partition hidden, which takes all ranks as one group");
  }
  for (const std::string& what : flags.what) {
    if (what != "combine" && o.hidden_partition) {
      throw Error(ErrorCode::bad_argument, "--partition hidden goes with combine alone, not with " + what);
    }
    if ((what == "experts" || what == "barrier") && !o.mesh.empty()) {
      throw Error(ErrorCode::bad_argument, "--mesh goes with dispatch, combine and layer, not with " + what);
    }
    if (o.batches > 1 && (what != "layer" || o.train || !o.mesh.empty())) {
      throw Error(ErrorCode::bad_argument, "--batches goes with inference of layer alone, without a mesh");
    }
    if (what == "layer" && flags.routes->count() > 0) {
      throw Error(ErrorCode::bad_argument, "--routes does not go with layer: its router chooses");
    }
  }
}

nlohmann::json row_as_json(const bench::Row& row, const Flags& flags, const Context& context) {
  const bench::Options& o = flags.options;
  nlohmann::json object = {
      {"what", row.what},     {"ranks", context.size()}, {"transport", context.communicator().transport_name()},
      {"p50_us", row.p50_us}, {"p99_us", row.p99_us},    {"wrong", row.wrong}};
  const bool layer = row.what.starts_with("layer");
  if (row.routed) {
    object.update({{"tokens", o.tokens}, {"hidden", o.hidden}, {"experts", o.experts}, {"topk", o.topk}});
    object["dtype"] = name(o.dtype);
    object["routes"] = layer ? "router" : o.routes;
  }
  if (layer || row.what == "experts") object["inner"] = o.inner;
  if (row.what == "dispatch") object["layout"] = name(o.layout);
  if (row.what == "combine") object["partition"] = o.hidden_partition ? "hidden" : "none";
  if (!flags.mesh.empty()) object["mesh"] = flags.mesh;
  if (row.bytes) object["bytes"] = *row.bytes;
  if (row.in_flight) {
    object.update({{"batches", o.batches}, {"in_flight", *row.in_flight}, {"late_us", o.late.count()}});
  }
  if (row.dispatch_us) object["dispatch_us"] = *row.dispatch_us;
  if (row.gbps) object["gbps"] = *row.gbps;
  if (row.of_copy) object["of_copy"] = *row.of_copy;
  if (row.of_peak) object["of_peak"] = *row.of_peak;
  return object;
}

std::string shown(const std::optional<double>& value, const char* format) {
  if (!value) return "-";
  char text[32];
  std::snprintf(text, sizeof text, format, *value);
  return text;
}

void print_header(const Flags& flags, const Context& context) {
  const bench::Options& o = flags.options;
  std::printf("# %s\n", this_machine().str().c_str());
  std::printf(
      "# %d ranks, %s, %d threads each, %s %s; %lld tokens per rank, hidden %lld, inner %lld, %lld of %lld "
      "experts, %s, %s\n",
      context.size(), std::string(context.communicator().transport_name()).c_str(), context.pool().threads(),
      context.kernels().name, context.kernels().isa, static_cast<long long>(o.tokens), static_cast<long long>(o.hidden),
      static_cast<long long>(o.inner), static_cast<long long>(o.topk), static_cast<long long>(o.experts),
      std::string(name(o.dtype)).c_str(), o.routes.c_str());
  if (!flags.mesh.empty()) std::printf("# mesh %s\n", flags.mesh.c_str());
  std::printf("%-14s %11s %11s %8s %8s %8s %6s\n", "what", "p50_us", "p99_us", "GB/s", "of_copy", "of_peak", "wrong");
  std::fflush(stdout);
}

void print_row(const bench::Row& row) {
  if (row.in_flight) {
    std::printf("%-14s %11.1f %11.1f   %d in flight, rank 0 in dispatch %9.1f us %6lld\n", row.what.c_str(), row.p50_us,
                row.p99_us, *row.in_flight, *row.dispatch_us, static_cast<long long>(row.wrong));
    std::fflush(stdout);
    return;
  }
  std::printf("%-14s %11.1f %11.1f %8s %8s %8s %6lld\n", row.what.c_str(), row.p50_us, row.p99_us,
              shown(row.gbps, "%.2f").c_str(), shown(row.of_copy, "%.2f").c_str(), shown(row.of_peak, "%.2f").c_str(),
              static_cast<long long>(row.wrong));
  std::fflush(stdout);
}

nlohmann::json measure(const Flags& flags, const Communicator& communicator, const Common& common) {
  const Context context(communicator, common.context_options());
  const bool speaks = context.rank() == 0;
  if (speaks) print_header(flags, context);
  nlohmann::json rows = nlohmann::json::array();
  for (const std::string& what : flags.what) {
    for (const bench::Row& row : bench::measure(what, context, flags.options)) {
      if (speaks) print_row(row);
      // Every rank has the same row, so all of them end here.
      if (row.wrong > 0) {
        throw Error(ErrorCode::internal, std::to_string(row.wrong) + " elements are wrong",
                    {.rank = 0, .operation = "bench " + row.what});
      }
      rows.push_back(row_as_json(row, flags, context));
    }
  }
  return {{"machine", this_machine().json()}, {"rows", rows}};
}

}  // namespace

Verb bench_verb() {
  auto flags = std::make_shared<Flags>();
  Verb verb;
  verb.name = "bench";
  verb.help = "Measure operations beside the limits of this machine.";
  verb.add_options = [flags](CLI::App& app) { add_flags(app, *flags); };
  verb.ranks = [flags] { return places_of_mesh(flags->mesh); };
  verb.check = [flags](const Common&) { check_flags(*flags); };
  verb.run = [flags](const Communicator& communicator, const Common& common) {
    return measure(*flags, communicator, common);
  };
  return verb;
}

}  // namespace expar::cli
