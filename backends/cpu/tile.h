// The microkernel: a tile of up to six rows by some vectors of columns, summed over words in order.
#pragma once

#include "backends/cpu/word.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

constexpr int kTileRows = 6;
constexpr int kLanes = 16;
constexpr int kPanel = 64;  // columns of a panel of packed weights

/// Left operand: rows that lie anywhere. With a tail, the word after the last is half a word (odd K in bf16).
struct RowsLeft {
  const std::byte* row[kTileRows];
  Word word(int r, std::int64_t s) const { return load_word(row[r] + 4 * s); }
  Word tail(int r, std::int64_t s) const { return load_half(row[r] + 4 * s); }
};

/// Left operand: words packed row beside row, padded to six.
struct PackedLeft {
  const Word* words;
  Word word(int r, std::int64_t s) const { return words[s * kTileRows + r]; }
  Word tail(int, std::int64_t) const { return 0; }
};

/// Right operand: `steps` rows of words, `stride` apart, then one more where there is a tail.
struct Right {
  const Word* words = nullptr;
  std::int64_t stride = 0;
  std::int64_t steps = 0;
  bool tail = false;
  const std::byte* ahead = nullptr;  // what will be read next: a step fetches one line of it into L2,
  std::int64_t ahead_stride = 64;    // and the next step one so many bytes further
};

/// sums[r * stride + c] (+)= sum over s of left(r, s) * right(s, c). `resume` continues the chains that are there.
// GCC 12 keeps the sums in memory, five times slower, unless every loop over them is unrolled by pragma.
template <class Step, int kRows, int kVectors, class Left>
void tile(const Left& left, const Right& right, float* sums, std::int64_t stride, bool resume) {
  Vector sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = resume ? load(sums + r * stride + v * kLanes) : zero();
  }
  const Word* at = right.words;
  const auto step = [&](auto word) __attribute__((always_inline)) {
    typename Step::Right b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) b[v] = Step::right(at + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename Step::Left a = Step::left(word(r));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Step::step(sum[r][v], a, b[v]);
    }
    at += right.stride;
  };
  if (right.ahead != nullptr) {
    const std::byte* ahead = right.ahead;
    for (std::int64_t s = 0; s < right.steps; ++s) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += right.ahead_stride;
      step([&](int r) { return left.word(r, s); });
    }
  } else {
    for (std::int64_t s = 0; s < right.steps; ++s) step([&](int r) { return left.word(r, s); });
  }
  if (right.tail) step([&](int r) { return left.tail(r, right.steps); });
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(sums + r * stride + v * kLanes, sum[r][v]);
  }
}

template <class Step, int kVectors, class Left>
void tile_of_rows(int rows, const Left& left, const Right& right, float* sums, std::int64_t stride, bool resume) {
  switch (rows) {
    case 1:
      return tile<Step, 1, kVectors>(left, right, sums, stride, resume);
    case 2:
      return tile<Step, 2, kVectors>(left, right, sums, stride, resume);
    case 3:
      return tile<Step, 3, kVectors>(left, right, sums, stride, resume);
    case 4:
      return tile<Step, 4, kVectors>(left, right, sums, stride, resume);
    case 5:
      return tile<Step, 5, kVectors>(left, right, sums, stride, resume);
    default:
      return tile<Step, 6, kVectors>(left, right, sums, stride, resume);
  }
}

template <class Step, int kMost, class Left>
void tile_of_vectors(int rows, int vectors, const Left& left, const Right& right, float* sums, std::int64_t stride,
                     bool resume) {
  if constexpr (kMost > 1) {
    if (vectors < kMost) return tile_of_vectors<Step, kMost - 1>(rows, vectors, left, right, sums, stride, resume);
  }
  tile_of_rows<Step, kMost>(rows, left, right, sums, stride, resume);
}

/// A tile of `rows` (1 to 6) by `vectors` (1 to 4), as many at once as the registers hold.
template <class Step, class Left>
void tile_of(int rows, int vectors, const Left& left, Right right, float* sums, std::int64_t stride, bool resume) {
  constexpr int kMost = Step::kVectorsAtOnce;
  for (int v = 0; v < vectors; v += kMost) {
    const int some = vectors - v < kMost ? vectors - v : kMost;
    tile_of_vectors<Step, kMost>(rows, some, left, right, sums + v * kLanes, stride, resume);
    right.words += kMost * kLanes;
    right.ahead = nullptr;
  }
}

/// How many rows of `left` make one tile, so that a block splits evenly: 8 are 4 and 4, not 6 and 2.
inline std::int64_t tile_height(std::int64_t rows) { return parts(rows, larger(parts(rows, kTileRows), 1)); }

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
