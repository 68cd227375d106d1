// The kernels for AVX-512 without bf16 dot products.
#define EXPAR_CPU_ISA avx512
#include "backends/cpu/vector_avx512_fma.h"

#include "backends/cpu/table.h"
