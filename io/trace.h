// Traces as Perfetto and Chrome show them: a row for each rank, the spans of its time on it.
#pragma once

#include <span>
#include <string>

#include <expar/trace.h>

namespace expar::io {

/// The events of one rank's row, as JSON without the brackets around them, so that rows can be sent and put together.
std::string trace_row(const Trace& trace, int rank);

/// The whole file: all rows under the name of the job.
std::string trace_file(const std::string& job, std::span<const std::string> rows);

}  // namespace expar::io
