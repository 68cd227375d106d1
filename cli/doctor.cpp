// expar doctor: what this machine offers, a verdict on each part of it, and what to do about problems. Transports are
// tried and rates are measured, not guessed.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <expar/collectives.h>

#include "bench/bench.h"
#include "bench/limits.h"
#include "bench/timing.h"
#include "cli/checks.h"
#include "cli/machine.h"
#include "cli/output.h"
#include "cli/verbs.h"

namespace expar::cli {
namespace {

/// A transport that cannot bring two idle ranks together in this time does not work.
constexpr double kProbeTimeout = 20;
constexpr int kWarmUp = 100;
constexpr int kBarriers = 1000;

/// Microseconds per barrier.
double time_barriers(const Communicator& communicator, const Common& common) {
  const Context context(communicator, common.context_options());
  for (int i = 0; i < kWarmUp; ++i) barrier(context);
  const auto start = Clock::now();
  for (int i = 0; i < kBarriers; ++i) barrier(context);
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count() / kBarriers;
}

std::string decimal(const nlohmann::json& value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value.get<double>());
  return text;
}

bool any(const std::vector<Check>& checks, Verdict verdict) {
  return std::any_of(checks.begin(), checks.end(), [&](const Check& check) { return check.verdict == verdict; });
}

std::string threads_of(const nlohmann::json& measured) {
  const int threads = measured["threads"];
  return std::to_string(threads) + (threads == 1 ? " thread" : " threads");
}

/// Processes of this program meet and leave; only their success is seen, so they time nothing.
void probe_processes(const Common& common) {
  const auto error = launch(common.ranks, {"/proc/self/exe", "doctor", "--probe", "--transport", common.transport,
                                           "--backend", common.backend, "--timeout", std::to_string(common.timeout)});
  if (error) throw *error;
}

nlohmann::json try_transport(const std::string& transport, Common common) {
  if (common.timeout == 0) common.timeout = kProbeTimeout;
  if (common.ranks == 0) common.ranks = 2;
  common.transport = transport;
  nlohmann::json row = {{"name", transport}, {"ranks", common.ranks}};
  try {
    if (!has_processes(transport)) {
      run_threads(
          common.ranks,
          [&](const Communicator& communicator) {
            const double us = time_barriers(communicator, common);
            if (communicator.rank() == 0) row["barrier_us"] = us;
          },
          common.run_options());
    } else {
      static_cast<void>(job_from_environment());  // where this process finds no job, its children would not
      probe_processes(common);
    }
    row["works"] = true;
  } catch (...) {
    row["works"] = false;
    row["problem"] = current_error().what();
  }
  return row;
}

nlohmann::json backends() {
  nlohmann::json rows = nlohmann::json::array();
  for (const std::string& name : available_backends()) {
    nlohmann::json row = {{"name", name}, {"isas", available_isas(name)}};
    try {
      row["chosen"] = find_kernels(name).isa;
    } catch (const Error& error) {
      row["problem"] = error.what();
    }
    rows.push_back(row);
  }
  return rows;
}

/// What to do about something that should work.
std::string advice_after(const std::vector<Check>& checks) {
  return any(checks, Verdict::problem) ? "solve the problems above first"
                                       : "report this with the whole output of expar doctor";
}

Check check_transport(const nlohmann::json& row, const std::vector<Check>& before) {
  Check check("transport " + row["name"].get<std::string>());
  if (row["works"].get<bool>()) {
    check.found = std::to_string(row["ranks"].get<int>()) + (row["ranks"] == 1 ? " rank" : " ranks") + " met and left";
    if (row.contains("barrier_us")) check.found += ", a barrier takes " + decimal(row["barrier_us"]) + " us";
    return check;
  }
  check.found = "does not work";
  check.problem(row["problem"], advice_after(before));
  return check;
}

/// Short enough for a doctor, long enough to tell an idle machine from a busy one.
constexpr double kSeconds = 0.3;
constexpr std::int64_t kCopied = 128 << 20;
/// Kernels reach more than twice this where they have the cores to themselves.
constexpr double kLittleOfPeak = 0.25;

nlohmann::json measure_rates(Common common) {
  common.transport.clear();  // one rank needs none in particular
  nlohmann::json measured;
  const bench::Options options{
      .tokens = 256, .hidden = 1024, .inner = 512, .experts = 8, .topk = 2, .seconds = kSeconds};
  run_threads(
      1,
      [&](const Communicator& communicator) {
        const Context context(communicator, common.context_options());
        bench::MemcpyProbe copy(context, kCopied);
        const bench::Times times = bench::measure_rounds(context, kSeconds, {{nullptr, [&] { copy.run(); }}});
        measured["copy_gbps"] = copy.bytes() / bench::median(times[0]) * 1e-3;

        const bench::Row row = bench::measure("experts", context, options).front();
        const auto sizes = static_cast<double>(options.tokens * options.topk * options.hidden * options.inner);
        measured["gemm_gflops"] = 3 * 2 * sizes / row.p50_us * 1e-3;  // gate, up and down; multiply and add
        measured["gemm_of_peak"] = *row.of_peak;
        measured["gemm_wrong"] = row.wrong;
        measured["isa"] = context.kernels().isa;
        measured["threads"] = context.pool().threads();
      },
      common.run_options());
  return measured;
}

Check check_copies(const nlohmann::json& measured) {
  return {"copies", decimal(measured["copy_gbps"]) + " GB/s on " + threads_of(measured)};
}

Check check_products(const nlohmann::json& measured) {
  const double of_peak = measured["gemm_of_peak"];
  Check check("GEMMs", decimal(measured["gemm_gflops"]) + " GFLOP/s in bf16 by " + measured["isa"].get<std::string>() +
                           " on " + threads_of(measured) + ", " + decimal(100 * of_peak) +
                           " % of the peak measured beside them");
  if (measured["gemm_wrong"] != 0) {
    check.problem(std::to_string(measured["gemm_wrong"].get<std::int64_t>()) + " elements of the result are wrong",
                  "set EXPAR_ISA=portable, and report this with the whole output of expar doctor");
  } else if (of_peak < kLittleOfPeak) {
    check.note("far below what this machine can do: something else uses its cores, or this is a debug build",
               "look at 'top', then try again with a release build (cmake --preset release)");
  }
  return check;
}

std::string counted(std::int64_t count, const char* thing) {
  return std::to_string(count) + " " + thing + (count == 1 ? "" : "s");
}

std::string verdict_on(const std::vector<Check>& checks) {
  const auto count = [&](Verdict verdict) {
    return std::count_if(checks.begin(), checks.end(), [&](const Check& check) { return check.verdict == verdict; });
  };
  const auto problems = count(Verdict::problem), notes = count(Verdict::note);
  return (problems == 0 ? "ok" : counted(problems, "problem")) + (notes == 0 ? "" : ", " + counted(notes, "note"));
}

void print(const Machine& machine, const std::vector<Check>& checks) {
  const auto word = [](Verdict verdict) {
    return verdict == Verdict::ok ? "ok" : verdict == Verdict::note ? "note" : "PROBLEM";
  };
  std::printf("%s\n\n", machine.str().c_str());
  for (const Check& check : checks) {
    std::printf("%-20s %-8s %s\n", check.name.c_str(), word(check.verdict), check.found.c_str());
    if (check.verdict == Verdict::ok) continue;
    std::printf("%29s %s\n%29s -> %s\n", "", check.reason.c_str(), "", check.advice.c_str());
  }
  std::printf("\nverdict: %s\n", verdict_on(checks).c_str());
}

/// The system first: what is tried after it may fail for the same reasons.
std::vector<Check> check_system(const Machine& machine, const Common& common) {
  return {check_cores(machine, common),
          check_instruction_sets(common.backend),
          check_shared_memory(),
          check_address_space(),
          check_locked_memory(),
          check_open_files(machine, common),
          check_waiting(),
          check_launchers(),
          check_numa()};
}

/// One mistake, one problem: the rest is tried without these variables.
void forget_mistakes(const std::vector<Check>& checks) {
  for (const Check& check : checks) {
    if (check.verdict != Verdict::problem) continue;
    if (check.name == "instruction sets") unsetenv("EXPAR_ISA");
    if (check.name == "waiting") unsetenv("EXPAR_TIMEOUT");
  }
}

void measure_into(nlohmann::json& report, std::vector<Check>& checks, const Common& common) {
  try {
    report["measured"] = measure_rates(common);
    checks.push_back(check_copies(report["measured"]));
    checks.push_back(check_products(report["measured"]));
  } catch (...) {
    Check check("rates", "could not be measured");
    const Error error = current_error();
    check.problem(error.what(), error.code() == ErrorCode::no_memory
                                    ? "end other programs, or raise the limits of memory above"
                                    : advice_after(checks));
    checks.push_back(check);
  }
}

nlohmann::json examine(const Common& common) {
  const Machine machine = this_machine();
  nlohmann::json report = {{"machine", machine.json()},
                           {"backends", backends()},
                           {"limits", limits()},
                           {"launchers", launchers()},
                           {"numa_nodes", numa_nodes()}};
  std::vector<Check> checks = check_system(machine, common);
  forget_mistakes(checks);
  report["transports"] = nlohmann::json::array();
  for (const std::string& transport : available_transports()) {
    report["transports"].push_back(try_transport(transport, common));
    checks.push_back(check_transport(report["transports"].back(), checks));
  }
  measure_into(report, checks, common);
  print(machine, checks);
  report["verdict"] = any(checks, Verdict::problem) ? "problem" : "ok";
  for (const Check& check : checks) report["checks"].push_back(check.json());
  return report;
}

}  // namespace

Verb doctor() {
  auto probe = std::make_shared<bool>(false);
  Verb verb;
  verb.name = "doctor";
  verb.help = "Say what this machine offers, try every transport, and what to do about problems.";
  verb.add_options = [probe](CLI::App& app) { app.add_flag("--probe", *probe)->group(""); };
  verb.run_alone = [probe](const Common& common) -> nlohmann::json {
    if (!*probe) return examine(common);
    time_barriers(init(common.run_options()), common);
    return nullptr;
  };
  return verb;
}

}  // namespace expar::cli
