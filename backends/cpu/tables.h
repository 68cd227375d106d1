// The tables of the instruction sets; calling a kernel of one that the processor lacks is an illegal instruction.
#pragma once

#include <expar/kernels.h>

namespace expar::cpu {

namespace avx512_bf16 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx2 {
extern const Kernels kTable;
}
namespace portable {
extern const Kernels kTable;
}

}  // namespace expar::cpu
