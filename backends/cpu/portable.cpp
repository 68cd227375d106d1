// The kernels in plain C++, for every processor.
#define EXPAR_CPU_ISA portable
#include "backends/cpu/vector_portable.h"

#include "backends/cpu/table.h"
