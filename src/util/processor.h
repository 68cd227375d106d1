// What differs between processors and has no name in the standard: floating-point modes, a polite spin, a fence.
#pragma once

#include <cstdint>

namespace expar {

/// Sets this thread's floating-point mode to what kernels compute in, and restores the caller's at
/// the end: round to nearest even, denormal inputs and results as zero (what vdpbf16ps does
/// whatever the mode), no traps.
class FloatMode {
 public:
  FloatMode();
  ~FloatMode();
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  std::uint64_t saved_;
};

/// Tells the processor that this thread waits for another.
void pause();

/// Non-temporal stores pass later stores, release or not, unless fenced by this.
void flush_streamed_stores();

}  // namespace expar
