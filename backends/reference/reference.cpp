// The table of the reference backend. Its packed layout is the plain one.
#include "backends/reference/reference.h"

#include <cstring>

#include "backends/reference/kernels.h"

namespace expar {
namespace reference {

std::int64_t packed_bytes(DType dtype, std::int64_t n, std::int64_t k) {
  return n * k * static_cast<std::int64_t>(size_of(dtype));
}

void pack(DType dtype, int groups, std::int64_t n, std::int64_t k, const void* w, void* packed, Pool&) {
  const std::int64_t bytes = groups * packed_bytes(dtype, n, k);
  if (bytes > 0) std::memcpy(packed, w, static_cast<std::size_t>(bytes));
}

}  // namespace reference

const Kernels& reference_kernels() {
  using namespace reference;
  static constexpr Kernels kTable = {
      .name = "reference",
      .isa = "portable",
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
  return kTable;
}

}  // namespace expar
