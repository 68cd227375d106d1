// Which instruction sets an x86-64 processor runs.
#include "backends/cpu/cpu.h"
#include "backends/cpu/tables.h"

namespace expar {

std::vector<const Kernels*> cpu_kernels() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  std::vector<const Kernels*> tables;
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&cpu::avx512_bf16::kTable);
  if (avx512) tables.push_back(&cpu::avx512::kTable);
  if (avx2) tables.push_back(&cpu::avx2::kTable);
  tables.push_back(&cpu::portable::kTable);
  return tables;
}

}  // namespace expar
