// Floating-point modes for processors we know nothing about: the rounding mode alone.
#include <cfenv>

#include "src/util/processor.h"

namespace expar {

FloatMode::FloatMode() : saved_(static_cast<std::uint64_t>(std::fegetround())) { std::fesetround(FE_TONEAREST); }

FloatMode::~FloatMode() { std::fesetround(static_cast<int>(saved_)); }

void pause() {}

void flush_streamed_stores() {}

}  // namespace expar
