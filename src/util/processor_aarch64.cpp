// Floating-point modes, the spin hint and the fence of 64-bit Arm.
#include "src/util/processor.h"

namespace expar {
namespace {

// FPCR: flush to zero (bit 24); rounding bits 0 are nearest, trap bits 0 are masked.
constexpr std::uint64_t kKernelMode = std::uint64_t{1} << 24;

}  // namespace

FloatMode::FloatMode() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" : : "r"(kKernelMode));
}

FloatMode::~FloatMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

// A yield takes no time where a core runs one thread.
void pause() { asm volatile("isb"); }

void flush_streamed_stores() { asm volatile("dmb ishst" : : : "memory"); }

}  // namespace expar
