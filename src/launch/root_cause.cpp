// The ranking of causes that root_cause.h promises.
#include "src/launch/root_cause.h"

#include <cstring>
#include <string>

namespace expar::launch_detail {
namespace {

const Error* first_report(const std::vector<Report>& reports, auto&& matches) {
  for (const Report& report : reports) {
    if (matches(report.error)) return &report.error;
  }
  return nullptr;
}

std::string name_of_signal(int signal) {
  const char* name = sigabbrev_np(signal);
  std::string text = "signal " + std::to_string(signal);
  if (name != nullptr) text += std::string(" (SIG") + name + ")";
  return text;
}

/// The launcher knows how a rank ended; a survivor knows during which operation.
Error describe(const Ending& ending, const std::vector<Report>& reports) {
  const std::string who = "rank " + std::to_string(ending.rank);
  if (ending.signal == 0) {
    return {ErrorCode::internal, who + " exited with status " + std::to_string(ending.status)};
  }
  const Error* witness = first_report(
      reports, [&](const Error& e) { return e.code() == ErrorCode::peer_lost && e.peer() == ending.rank; });
  return {ErrorCode::peer_lost,
          who + " was killed by " + name_of_signal(ending.signal),
          {.rank = -1, .peer = ending.rank, .operation = witness == nullptr ? std::string() : witness->operation()}};
}

}  // namespace

Error root_cause(const std::vector<Report>& reports, const std::vector<Ending>& endings) {
  const Error* primary = first_report(reports, [](const Error& e) { return !e.fatal(); });
  if (primary != nullptr) return *primary;
  for (const Ending& ending : endings) {
    if (!ending.reported) return describe(ending, reports);
  }
  const Error* late = first_report(reports, [](const Error& e) { return e.code() == ErrorCode::timeout; });
  if (late != nullptr) return *late;
  if (!reports.empty()) return reports.front().error;
  return describe(endings.front(), reports);
}

}  // namespace expar::launch_detail
