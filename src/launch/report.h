// How a rank hands the error that ends it to its launcher: one datagram on an inherited socket.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include <expar/error.h>

namespace expar::launch_detail {

/// "FD:INODE": the rank's end of the channel. The inode tells the socket from a file that took its
/// number after a program closed what it did not know.
inline constexpr const char* kReportVariable = "EXPAR_REPORT_FD";

struct Report {
  int from = -1;  // the rank that reports
  Error error{ErrorCode::internal, ""};
};

/// The launcher's end, and the other one that its children inherit.
class ReportChannel {
 public:
  /// Throws Error: io.
  ReportChannel();
  ~ReportChannel();
  ReportChannel(const ReportChannel&) = delete;
  ReportChannel& operator=(const ReportChannel&) = delete;

  /// What kReportVariable says in a child.
  std::string variable() const;
  int child_end() const { return ends_[1]; }
  /// Readable while a report waits.
  int fd() const { return ends_[0]; }
  /// The reports that have arrived since the last call. Never waits; drops what is not a report.
  std::vector<Report> receive();

 private:
  int ends_[2] = {-1, -1};
};

}  // namespace expar::launch_detail
