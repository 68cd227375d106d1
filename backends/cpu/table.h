// The table of one instruction set; each .cpp of the backend is this under its own flags.
#pragma once

#include "backends/cpu/activation.h"
#include "backends/cpu/gemm_tn.h"
#include "backends/cpu/optimizer.h"
#include "backends/cpu/quantise.h"
#include "backends/cpu/router.h"
#include "backends/cpu/rows.h"
#include "backends/cpu/tables.h"

namespace expar::cpu::EXPAR_CPU_ISA {

// The set's name is its namespace's.
#define EXPAR_CPU_NAME(isa) EXPAR_CPU_QUOTED(isa)
#define EXPAR_CPU_QUOTED(isa) #isa

constexpr Kernels kTable = {
    .name = "cpu",
    .isa = EXPAR_CPU_NAME(EXPAR_CPU_ISA),
    .gemm_nt = gemm_nt,
    .gemm_nn = gemm_nn,
    .gemm_tn = gemm_tn,
    .activate = activate,
    .activate_grad = activate_grad,
    .gather = gather,
    .reduce = reduce,
    .rms_norm = rms_norm,
    .softmax_topk = softmax_topk,
    .adamw = adamw,
    .quantise = quantise,
    .dequantise = dequantise,
    .packed_bytes = packed_bytes,
    .pack = pack,
};

}  // namespace expar::cpu::EXPAR_CPU_ISA
