// Memory without a name: memfds whose size nobody can change any more.
#pragma once

#include <cstddef>

#include "transports/shm/fd.h"

namespace expar::shm {

/// A zeroed memfd of exactly `bytes` (whole pages), all of it allocated, sealed against any change of size.
/// Throws Error: no_memory, unsupported (no memfd here).
Fd make_sealed(std::size_t bytes);

/// True if `file` is a memfd of exactly `bytes` that can neither shrink nor grow: then mapping it can never fault,
/// whatever the process that sent it does.
bool is_sealed(int file, std::size_t bytes);

}  // namespace expar::shm
