// expar doctor: what this machine offers, and whether each way to connect ranks really works here.
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <memory>

#include <expar/collectives.h>

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

std::string one_decimal(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

/// Two processes of this program meet and leave; only their success is seen, so they time nothing.
void probe_processes(const std::string& transport, int ranks, const Common& common) {
  const LaunchResult result = launch(ranks, {"/proc/self/exe", "doctor", "--probe", "--transport", transport,
                                             "--backend", common.backend, "--timeout", std::to_string(common.timeout)});
  if (result.failed) throw result.error;
}

nlohmann::json try_transport(const std::string& transport, Common common) {
  nlohmann::json row = {{"name", transport}};
  if (common.timeout == 0) common.timeout = kProbeTimeout;
  const int ranks = common.ranks == 0 ? 2 : common.ranks;
  try {
    if (transport == "threads") {
      run_threads(
          ranks,
          [&](const Communicator& communicator) {
            const double us = time_barriers(communicator, common);
            if (communicator.rank() == 0) row["barrier_us"] = us;
          },
          common.run_options());
    } else {
      probe_processes(transport, ranks, common);
    }
    row["works"] = true;
  } catch (...) {
    row["works"] = false;
    row["problem"] = current_error().what();
  }
  return row;
}

bool has_sealed_memory() {
  const int fd = static_cast<int>(syscall(SYS_memfd_create, "expar", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd < 0) return false;
  const bool sealed =
      ftruncate(fd, 4096) == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0;
  close(fd);
  return sealed;
}

bool has_futex() {
  std::uint32_t word = 1;
  // The word is not 0, so a working futex refuses to sleep.
  return syscall(SYS_futex, &word, FUTEX_WAIT, 0, nullptr, nullptr, 0) != 0 && errno == EAGAIN;
}

bool has_pidfd() {
  const int fd = static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0));
  if (fd >= 0) close(fd);
  return fd >= 0;
}

nlohmann::json limits() {
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  return {{"open_files", files.rlim_cur},
          {"sealed_memory", has_sealed_memory()},
          {"futex", has_futex()},
          {"pidfd", has_pidfd()}};
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

std::string joined(const nlohmann::json& words) {
  std::string line;
  for (const auto& word : words) line += (line.empty() ? "" : " ") + word.get<std::string>();
  return line;
}

void print_row(const std::string& what, const std::string& value) {
  std::printf("%-20s %s\n", what.c_str(), value.c_str());
}

std::string yes_no(const nlohmann::json& value) { return value.get<bool>() ? "yes" : "no"; }

void print(const Machine& machine, const nlohmann::json& report) {
  print_row("machine", machine.str());
  if (machine.quota > 0) print_row("cgroup quota", one_decimal(machine.quota) + " cores");
  print_row("instruction sets", joined(machine.features));
  print_row("huge pages", machine.huge_pages);
  for (const auto& row : report["backends"]) {
    const std::string chosen =
        row.contains("problem") ? row["problem"] : nlohmann::json("takes " + row["chosen"].get<std::string>());
    print_row("backend " + row["name"].get<std::string>(), joined(row["isas"]) + "; " + chosen);
  }
  for (const auto& row : report["transports"]) {
    std::string verdict = row["works"].get<bool>() ? "works" : "FAILS: " + row["problem"].get<std::string>();
    if (row.contains("barrier_us")) {
      verdict += ", a barrier takes " + one_decimal(row["barrier_us"].get<double>()) + " us";
    }
    print_row("transport " + row["name"].get<std::string>(), verdict);
  }
  const nlohmann::json& limit = report["limits"];
  print_row("open files", std::to_string(limit["open_files"].get<std::uint64_t>()));
  print_row("sealed memory", yes_no(limit["sealed_memory"]));
  print_row("futex", yes_no(limit["futex"]));
  print_row("pidfd", yes_no(limit["pidfd"]));
}

nlohmann::json examine(const Common& common) {
  const Machine machine = this_machine();
  nlohmann::json report = {{"machine", machine.json()}, {"backends", backends()}, {"limits", limits()}};
  report["transports"] = nlohmann::json::array();
  for (const std::string& transport : available_transports()) {
    report["transports"].push_back(try_transport(transport, common));
  }
  print(machine, report);
  return report;
}

}  // namespace

Verb doctor() {
  auto probe = std::make_shared<bool>(false);
  Verb verb;
  verb.name = "doctor";
  verb.help = "Show what this machine offers and try every transport with 2 ranks.";
  verb.add_options = [probe](CLI::App& app) { app.add_flag("--probe", *probe)->group(""); };
  verb.run_alone = [probe](const Common& common) -> nlohmann::json {
    if (!*probe) return examine(common);
    time_barriers(init(common.run_options()), common);
    return nullptr;
  };
  return verb;
}

}  // namespace expar::cli
