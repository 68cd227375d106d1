// Runs a verb on its ranks: threads, processes of our own, or processes that somebody else has started.
#pragma once

#include <string>
#include <vector>

#include "cli/verb.h"

namespace expar::cli {

/// Runs `verb` to its end; rank 0 writes the result to --json.
///   words : the whole command line after the program, for the processes that are started with it
/// Throws the root cause of the job, the same on every rank. Error: bad_argument (--ranks or --transport contradict
/// the launcher of this process), unsupported (a transport that is not in this build).
void run(const Verb& verb, const Common& common, const std::vector<std::string>& words);

/// True if this process is to tell people and programs about `error`; of a job's processes one is, and it is alive.
bool speaks_for(const Job& job, const Error& error);

}  // namespace expar::cli
