// The SIMD backend of CPUs: which instruction sets this processor runs.
#pragma once

#include <vector>

#include <expar/kernels.h>

namespace expar {

/// Best first; the last is `portable`, which every processor runs. All give the same bits, for f32 and bf16: every
/// element is one chain of fused multiply-adds in index order, and a pair of bf16 products is added odd first, then
/// even, denormals as zero, which is what vdpbf16ps does. Weight gradients in bf16 pair rows (2i, 2i + 1) of a group.
std::vector<const Kernels*> cpu_kernels();

}  // namespace expar
