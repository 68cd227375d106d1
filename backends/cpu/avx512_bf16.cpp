// The kernels for AVX-512 with bf16 dot products.
#define EXPAR_CPU_ISA avx512_bf16
#include "backends/cpu/vector_avx512_bf16.h"

#include "backends/cpu/table.h"
