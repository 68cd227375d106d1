// Which loops an x86 processor runs.
#include "bench/loops.h"

namespace expar::bench {

Loops fastest_loops() {
  Loops loops = portable_loops();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) loops = avx2_loops();
  if (__builtin_cpu_supports("avx512f")) loops = avx512_loops();
  if (__builtin_cpu_supports("avx512bf16")) loops.flops_bf16 = avx512_bf16_loops().flops_bf16;
  return loops;
}

}  // namespace expar::bench
