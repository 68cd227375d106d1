// Tables of kernels that lack some: what they call instead.
#pragma once

#include <tuple>

#include <expar/kernels.h>

namespace expar {

/// The entries that fall back one by one.
inline constexpr auto kEntries =
    std::tuple(&Kernels::gemm_nt, &Kernels::gemm_nn, &Kernels::gemm_tn, &Kernels::activate, &Kernels::activate_grad,
               &Kernels::gather, &Kernels::reduce, &Kernels::rms_norm, &Kernels::softmax_topk, &Kernels::adamw,
               &Kernels::quantise, &Kernels::dequantise);
static_assert(sizeof(Kernels) == (std::tuple_size_v<decltype(kEntries)> + 4) * sizeof(void (*)()),
              "an entry of Kernels falls back nowhere: besides these there are name, isa, packed_bytes and pack");

/// `table` with its empty entries taken from `other`.
constexpr Kernels with_fallback(Kernels table, const Kernels& other) {
  const auto fill = [&](auto entry) {
    if (table.*entry == nullptr) table.*entry = other.*entry;
  };
  std::apply([&](auto... entries) { (fill(entries), ...); }, kEntries);
  if (table.pack == nullptr) {  // a packed layout belongs to the GEMM that reads it
    table.packed_bytes = other.packed_bytes;
    table.pack = other.pack;
  }
  return table;
}

}  // namespace expar
