// The one error that ends a job: set once, the same for every rank.
#pragma once

#include <optional>

#include <expar/error.h>

#include "transports/shared/job_memory.h"

namespace expar::local {

/// The job's cause, if one is set. One load while there is none.
std::optional<Error> cause(const JobMemory& job);

/// Offers `error` as the job's cause on behalf of `rank`, wakes everyone, and returns the cause in force.
/// Only `rank` itself may call this for `rank`.
Error set_cause(const JobMemory& job, int rank, const Error& error);

}  // namespace expar::local
