// Counts what a program that links allocations.cpp asks operator new for.
#pragma once

#include <cstdint>

namespace expar::test {

/// So far, on this thread. Arrays by new[] are not counted under a sanitizer, which keeps those to itself.
std::int64_t allocations();

}  // namespace expar::test
