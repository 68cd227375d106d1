// The kernels of the reference backend, and how they read and write one element of f32 or bf16
// memory.
#pragma once

#include <expar/kernels.h>

namespace expar::reference {

inline float load(const void* data, DType dtype, std::int64_t i) {
  return dtype == DType::bf16 ? static_cast<float>(static_cast<const bf16*>(data)[i])
                              : static_cast<const float*>(data)[i];
}

inline void store(void* data, DType dtype, std::int64_t i, float value) {
  if (dtype == DType::bf16) {
    static_cast<bf16*>(data)[i] = bf16(value);
  } else {
    static_cast<float*>(data)[i] = value;
  }
}

inline float load(const Rows& rows, std::int64_t row, std::int64_t column) {
  const RowRef ref = rows.refs ? rows.refs[row] : RowRef{0, static_cast<std::int32_t>(row)};
  return load(rows.base[ref.base], rows.dtype, ref.row * rows.width + column);
}

void gemm_nt(const GemmNT& p, Pool& pool);
void gemm_nn(const GemmNN& p, Pool& pool);
void gemm_tn(const GemmTN& p, Pool& pool);
void activate(const Activate& p, Pool& pool);
void activate_grad(const ActivateGrad& p, Pool& pool);
void gather(const Gather& p, Pool& pool);
void reduce(const Reduce& p, Pool& pool);
void rms_norm(const RmsNormRows& p, Pool& pool);
void softmax_topk(const SoftmaxTopK& p, Pool& pool);
void adamw(const AdamWStep& p, Pool& pool);
void quantise(const Quantise& p, Pool& pool);
void dequantise(const Dequantise& p, Pool& pool);
std::int64_t packed_bytes(DType dtype, std::int64_t n, std::int64_t k);
void pack(DType dtype, int groups, std::int64_t n, std::int64_t k, const void* w, void* packed, Pool& pool);

}  // namespace expar::reference
