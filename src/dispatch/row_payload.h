// How the rows of a dispatch travel: as they are, or as a payload.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory_resource>
#include <optional>
#include <span>
#include <vector>

#include <expar/context.h>

#include "src/util/copy.h"

namespace expar {

class RowPayload {
 public:
  RowPayload(const Context& context, ConstTensor x, std::optional<DType> payload)
      : context_(context), dtype_(x.dtype()), width_(x.shape().rank() == 2 ? x.size(1) : 0) {
    if (payload && *payload != dtype_) payload_ = payload;
  }

  /// False: rows travel as they are.
  explicit operator bool() const { return payload_.has_value(); }
  /// Bytes of a row on its way, and before and after it.
  std::size_t row_bytes() const {
    return payload_ ? static_cast<std::size_t>(payload_bytes(*payload_, width_)) : full_bytes();
  }
  std::size_t full_bytes() const { return static_cast<std::size_t>(width_) * size_of(dtype_); }

  /// Rows `tokens` of x go to `to`, one after the other, as they travel.
  void write(std::byte* to, ConstTensor x, std::span<const std::int32_t> tokens, Store store) const {
    if (!payload_) return copy_rows(to, x.bytes(), tokens, row_bytes(), store);
    write(to, x, tokens.data(), static_cast<std::int64_t>(tokens.size()));
  }
  /// All rows of x.
  void write(std::byte* to, ConstTensor x) const {
    if (payload_) return write(to, x, nullptr, x.size(0));
    if (x.byte_size() > 0) std::memcpy(to, x.data(), x.byte_size());
  }
  /// `count` rows that have travelled as a payload go to `to`, as they were but for the rounding.
  void read(std::byte* to, const std::byte* from, std::int64_t count) const {
    context_.kernels().dequantise(
        {.payload = *payload_, .dtype = dtype_, .count = count, .width = width_, .rows = from, .out = to},
        context_.pool());
  }
  /// All rows of x as those that travel arrive.
  void round(std::byte* to, ConstTensor x) const {
    std::pmr::vector<std::byte> way(static_cast<std::size_t>(x.size(0)) * row_bytes(), context_.memory().get());
    write(way.data(), x);
    read(to, way.data(), x.size(0));
  }

 private:
  void write(std::byte* to, ConstTensor x, const std::int32_t* tokens, std::int64_t count) const {
    context_.kernels().quantise({.payload = *payload_,
                                 .dtype = dtype_,
                                 .count = count,
                                 .width = width_,
                                 .rows = x.data(),
                                 .index = tokens,
                                 .out = to},
                                context_.pool());
  }

  Context context_;
  DType dtype_;
  std::int64_t width_;
  std::optional<DType> payload_;
};

}  // namespace expar
