// Floating-point modes, the spin hint and the fence of x86-64.
#include <immintrin.h>

#include "src/util/processor.h"

namespace expar {
namespace {

// MXCSR: all exceptions masked (0x1f80), round to nearest (0), flush to zero (0x8000), denormals
// are zero (0x40).
constexpr std::uint32_t kKernelMode = 0x1f80u | 0x8000u | 0x0040u;

}  // namespace

FloatMode::FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(kKernelMode); }

FloatMode::~FloatMode() { _mm_setcsr(static_cast<std::uint32_t>(saved_)); }

void pause() { _mm_pause(); }

void flush_streamed_stores() { _mm_sfence(); }

}  // namespace expar
