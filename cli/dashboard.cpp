// The names of the curves, and which number is in which.
#include "cli/dashboard.h"

#include <algorithm>
#include <numeric>
#include <span>

#include "cli/phases.h"

namespace expar::cli {
namespace {

void add_loads(io::Summary& summary, const std::string& layer, std::span<const std::int64_t> loads) {
  summary.histogram(layer, io::histogram_of_counts(loads));
  for (std::size_t e = 0; e < loads.size(); ++e) {
    summary.scalar(layer + "/expert" + std::to_string(e), static_cast<float>(loads[e]));
  }
  const std::int64_t sum = std::accumulate(loads.begin(), loads.end(), std::int64_t{0});
  if (sum == 0) return;  // then there is no mean to compare with
  const auto most = static_cast<double>(*std::max_element(loads.begin(), loads.end()));
  const double mean = static_cast<double>(sum) / static_cast<double>(loads.size());
  summary.scalar(layer + "/max_over_mean", static_cast<float>(most / mean));
}

void add_times(io::Summary& summary, const Progress& progress) {
  const auto add = [&](const char* phase, double milliseconds) {
    summary.scalar(std::string("phase_ms/") + phase, static_cast<float>(milliseconds));
  };
  for (const NamedPhase& phase : kPhases) add(phase.name, progress.phase_ms.*phase.ms);
  add("optimizer", progress.optimizer_ms);
}

}  // namespace

Dashboard::Dashboard(const std::string& directory, const TrainOptions& options)
    : events_(directory), options_(options) {}

void Dashboard::show(const Progress& progress) {
  io::Summary summary;
  summary.scalar("loss", progress.loss);
  summary.scalar("lr", progress.lr);
  summary.scalar("tokens_per_s", static_cast<float>(1e3 * static_cast<double>(options_.batch) / progress.step_ms));
  add_times(summary, progress);
  const auto experts = static_cast<std::size_t>(options_.model.moe.router.experts);
  for (std::size_t layer = 0; layer * experts < progress.loads.size(); ++layer) {
    add_loads(summary, "load/layer" + std::to_string(layer), progress.loads.subspan(layer * experts, experts));
  }
  events_.write(progress.step, summary);
}

void Dashboard::show_heldout(const TrainReport& report) {
  io::Summary summary;
  summary.scalar("heldout_bits_per_byte", static_cast<float>(report.heldout_bits_per_byte));
  events_.write(options_.steps, summary);
}

}  // namespace expar::cli
