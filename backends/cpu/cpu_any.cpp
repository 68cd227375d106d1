// The instruction sets of processors without kernels of their own: what the compiler makes of the portable ones.
#include "backends/cpu/cpu.h"
#include "backends/cpu/tables.h"

namespace expar {

std::vector<const Kernels*> cpu_kernels() { return {&cpu::portable::kTable}; }

}  // namespace expar
