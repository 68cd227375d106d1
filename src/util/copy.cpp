// Copies of rows, in portable code; the x86 stores are chosen where the compiler targets x86.
#include "src/util/copy.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace expar {
namespace {

using CopyRow = void (*)(std::byte* to, const std::byte* from, std::size_t bytes);

void copy_cached(std::byte* to, const std::byte* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

#if defined(__x86_64__)

void copy_string(std::byte* to, const std::byte* from, std::size_t bytes) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

void copy_streaming(std::byte* to, const std::byte* from, std::size_t bytes) {
  // Whole cache lines go past the cache; what is before and after them, through it.
  const std::size_t head = (64 - reinterpret_cast<std::uintptr_t>(to) % 64) % 64;
  if (bytes < head + 64) return copy_cached(to, from, bytes);
  std::memcpy(to, from, head);
  std::size_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    const auto* source = reinterpret_cast<const __m128i*>(from + i);
    auto* target = reinterpret_cast<__m128i*>(to + i);
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  std::memcpy(to + i, from + i, bytes - i);
}

constexpr CopyRow kCopies[kStores] = {copy_cached, copy_string, copy_streaming};

#else

constexpr CopyRow kCopies[kStores] = {copy_cached, copy_cached, copy_cached};

#endif

}  // namespace

void copy_rows(std::byte* to, const std::byte* from, std::span<const std::int32_t> rows, std::size_t row_bytes,
               Store store) {
  if (row_bytes == 0) return;  // there may be no memory either
  const CopyRow copy = kCopies[static_cast<int>(store)];
  for (std::size_t i = 0; i < rows.size(); ++i, to += row_bytes) {
    const std::byte* row = from + static_cast<std::size_t>(rows[i]) * row_bytes;
    if (i + 1 < rows.size()) __builtin_prefetch(from + static_cast<std::size_t>(rows[i + 1]) * row_bytes);
    copy(to, row, row_bytes);
  }
}

}  // namespace expar
