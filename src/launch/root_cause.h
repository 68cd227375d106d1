// Which of the failures of a job is the cause, and which only follow from it.
#pragma once

#include <vector>

#include <expar/error.h>

#include "src/launch/report.h"

namespace expar::launch_detail {

/// A rank that ended badly, as the launcher saw it. In the order in which they ended.
struct Ending {
  int rank = 0;
  int signal = 0;  // what killed it, or 0
  int status = 0;  // what it exited with, where no signal did
  bool reported = false;
};

/// Reports first, in the order of their arrival, except those that name a late or a lost rank:
/// those follow from another failure whenever there is one. Then ranks that ended without a word;
/// then a timeout, then a loss. One of the two lists must hold something.
Error root_cause(const std::vector<Report>& reports, const std::vector<Ending>& endings);

}  // namespace expar::launch_detail
