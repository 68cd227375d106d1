// Ctrl-C while a rank waits for others: Python's signal handlers run, and what they raise ends the job.
#pragma once

#include <atomic>
#include <memory>

#include <expar/communicator.h>

namespace expar::python {

/// From here on waits of this rank run Python's signal handlers, and end where `stop`, if there is one, is true.
void make_interruptible(const Communicator& communicator, std::shared_ptr<const std::atomic<bool>> stop = nullptr);

/// If a signal handler has raised in a wait of this thread: sets that as Python's error and returns true. With the GIL.
bool raise_interrupt();

}  // namespace expar::python
