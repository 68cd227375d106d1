// The kernels for AVX2 with FMA.
#define EXPAR_CPU_ISA avx2
#include "backends/cpu/vector_avx2.h"

#include "backends/cpu/table.h"
