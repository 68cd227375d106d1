// Packing: turning rows of memory into the words that a tile reads one after the other.
#pragma once

#include "backends/cpu/tile.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

/// The part of an inner length that one tile sums: words [first, first + steps) and, at its end, half a word.
struct Chunk {
  std::int64_t first = 0, steps = 0;
  bool tail = false;
};

/// Cuts an inner length into chunks of at most `most` words. Sums are kept in f32 between chunks, which changes no bit.
class Chunks {
 public:
  Chunks(std::int64_t length, std::int64_t per_word, std::int64_t most)
      : words_(length / per_word), odd_(length % per_word != 0), most_(most) {}
  std::int64_t count() const { return larger(parts(words_, most_), 1); }
  Chunk operator[](std::int64_t i) const {
    return {i * most_, smaller(most_, words_ - i * most_), odd_ && i == count() - 1};
  }

 private:
  std::int64_t words_;
  bool odd_;
  std::int64_t most_;
};

/// to[s][r] = word chunk.first + s of rows[r], for `count` rows padded with zero to `vectors` times sixteen.
inline void pack_transposed(const std::byte* const* rows, std::int64_t count, int vectors, const Chunk& chunk,
                            Word* to) {
  const std::int64_t stride = vectors * kLanes;
  for (std::int64_t r = 0; r < stride; r += kLanes) {
    const std::int64_t some = smaller(larger(count - r, 0), kLanes);
    std::int64_t s = 0;
    if (some == kLanes) {
      for (; s + kLanes <= chunk.steps; s += kLanes) {
        const std::byte* at[kLanes];
        for (int i = 0; i < kLanes; ++i) at[i] = rows[r + i] + 4 * (chunk.first + s);
        transpose(at, to + s * stride + r, stride);
      }
    } else if (some > 0) {
      // Rows that are not there are read from the first one and then zeroed: a transpose costs less than a loop.
      for (; s + kLanes <= chunk.steps; s += kLanes) {
        const std::byte* at[kLanes];
        for (int i = 0; i < kLanes; ++i) at[i] = rows[r + (i < some ? i : 0)] + 4 * (chunk.first + s);
        transpose(at, to + s * stride + r, stride);
        for (int j = 0; j < kLanes; ++j) {
          for (std::int64_t i = some; i < kLanes; ++i) to[(s + j) * stride + r + i] = 0;
        }
      }
    }
    for (; s < chunk.steps + (chunk.tail ? 1 : 0); ++s) {
      for (std::int64_t i = 0; i < kLanes; ++i) {
        const std::byte* const at = i < some ? rows[r + i] + 4 * (chunk.first + s) : nullptr;
        to[s * stride + r + i] = at == nullptr ? 0 : s < chunk.steps ? load_word(at) : load_half(at);
      }
    }
  }
}

/// One row of words of a panel: `columns` of the row(s) that a step joins, padded with zero to 64.
// A whole panel has a path of its own: sizes that the compiler knows become a few moves instead of calls.
inline void pack_step(F32, const std::byte* row, const std::byte*, std::int64_t columns, Word* to) {
  if (columns == kPanel) {
    __builtin_memcpy(to, row, kPanel * 4);
    return;
  }
  __builtin_memcpy(to, row, static_cast<std::size_t>(columns) * 4);
  for (std::int64_t c = columns; c < kPanel; ++c) to[c] = 0;
}
inline void join(const std::uint16_t* even, const std::uint16_t* odd, Word* to) {
  for (std::int64_t c = 0; c < kPanel; ++c) to[c] = even[c] | (static_cast<Word>(odd[c]) << 16);
}
inline void pack_step(Bf16, const std::byte* even, const std::byte* odd, std::int64_t columns, Word* to) {
  if (columns == kPanel && odd != nullptr) {
    join(reinterpret_cast<const std::uint16_t*>(even), reinterpret_cast<const std::uint16_t*>(odd), to);
    return;
  }
  std::uint16_t low[kPanel] = {}, high[kPanel] = {};
  __builtin_memcpy(low, even, static_cast<std::size_t>(columns) * 2);
  if (odd != nullptr) __builtin_memcpy(high, odd, static_cast<std::size_t>(columns) * 2);
  join(low, high, to);
}

/// to[s][c] joins rows (2 s, 2 s + 1) in bf16, row s in f32; row_of(i) tells where row i starts, of [first, last).
template <class Step, class RowOf>
void pack_rows(std::int64_t first, std::int64_t last, std::int64_t columns, const RowOf& row_of, Word* to) {
  // Rows lie far apart, where the processor does not fetch ahead by itself.
  constexpr std::int64_t kAhead = 16;
  for (std::int64_t i = first; i < last; i += Step::kPerWord) {
    for (std::int64_t j = i + kAhead; j < smaller(i + kAhead + Step::kPerWord, last); ++j) {
      for (std::int64_t c = 0; c < columns * 4 / Step::kPerWord; c += 64) __builtin_prefetch(row_of(j) + c);
    }
    const bool joined = Step::kPerWord == 2 && i + 1 < last;
    pack_step(Step{}, row_of(i), joined ? row_of(i + 1) : nullptr, columns, to);
    to += kPanel;
  }
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
