// The gradient of weights, dw = dy^T x: one chain over a group's rows for each element, and its bias.
#pragma once

#include "backends/cpu/gemm.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

// Words of a chunk of rows: its panel of x takes 64 KiB, its tiles of dy up to 256 KiB.
constexpr std::int64_t kRowWords = 256;

/// to[tile][s][6]: outputs [n0, n1) of dy in tiles of six, rows [first, last) joined as words.
inline void pack_outputs(F32, const float* dy, std::int64_t width, std::int64_t first, std::int64_t last,
                         std::int64_t n0, std::int64_t n1, Word* to) {
  for (std::int64_t n = n0; n < n1; n += kTileRows) {
    const std::int64_t some = smaller(kTileRows, n1 - n);
    for (std::int64_t i = first; i < last; ++i) {
      if (some == kTileRows) {
        __builtin_memcpy(to, dy + i * width + n, kTileRows * 4);
      } else {
        for (std::int64_t j = 0; j < some; ++j) __builtin_memcpy(to + j, dy + i * width + n + j, 4);
      }
      to += kTileRows;
    }
  }
}
inline void pack_outputs(Bf16, const std::uint16_t* dy, std::int64_t width, std::int64_t first, std::int64_t last,
                         std::int64_t n0, std::int64_t n1, Word* to) {
  for (std::int64_t n = n0; n < n1; n += kTileRows) {
    const std::int64_t some = smaller(kTileRows, n1 - n);
    for (std::int64_t i = first; i < last; i += 2) {
      const std::uint16_t* const even = dy + i * width + n;
      for (std::int64_t j = 0; j < some; ++j) {
        to[j] = even[j] | (i + 1 < last ? static_cast<Word>(even[width + j]) << 16 : 0);
      }
      to += kTileRows;
    }
  }
}

/// dbias[n] (+)= dy[i, n], row by row.
template <class E>
void sum_rows(const E* dy, std::int64_t width, std::int64_t begin, std::int64_t end, std::int64_t count, float* dbias) {
  for (std::int64_t i = begin; i < end; ++i) {
#pragma GCC ivdep
    for (std::int64_t n = 0; n < count; ++n) dbias[n] += widen(dy[i * width + n]);
  }
}

template <class Step, class E>
void tn(const GemmTN& p, Pool& pool) {
  const Cut cut(p.groups, p.n, pool.threads());
  const E* const dy = static_cast<const E*>(p.dy);
  constexpr std::int64_t kRows = kRowWords * Step::kPerWord;
  pool.run(cut.tasks, [&](std::int64_t task, int worker) {
    const FloatMode mode;
    const int g = cut.group(task);
    const std::int64_t begin = p.groups.offsets[g], end = p.groups.offsets[g + 1];
    const std::int64_t n0 = cut.first(task), n1 = cut.last(task, p.n), outputs = n1 - n0;
    float* const dw = p.dw + (g * p.n + n0) * p.k;
    float* const dbias = p.dbias ? p.dbias + g * p.n + n0 : nullptr;
    if (begin == end) __builtin_memset(dw, 0, static_cast<std::size_t>(outputs * p.k) * 4);
    if (dbias) __builtin_memset(dbias, 0, static_cast<std::size_t>(outputs) * 4);
    if (begin == end) return;
    if (dbias) sum_rows(dy + n0, p.n, begin, end, outputs, dbias);

    const std::int64_t longest = smaller(parts(end - begin, Step::kPerWord), kRowWords);
    const std::int64_t left_words = parts(outputs, kTileRows) * kTileRows * longest;
    Slices slices(pool.scratch(worker, static_cast<std::size_t>((left_words + longest * kPanel) * 4 + 128)));
    Word* const left = slices.take<Word>(left_words);
    Word* const panel = slices.take<Word>(longest * kPanel);
    for (std::int64_t first = begin; first < end; first += kRows) {
      const std::int64_t last = smaller(first + kRows, end), steps = parts(last - first, Step::kPerWord);
      const bool resume = first > begin;
      pack_outputs(Step{}, dy, p.n, first, last, n0, n1, left);
      for (std::int64_t k = 0; k < p.k; k += kPanel) {
        const std::int64_t columns = smaller(kPanel, p.k - k);
        const auto row_of = [&](std::int64_t i) {
          return row_at(p.rows, i) + k * static_cast<std::int64_t>(sizeof(E));
        };
        pack_rows<Step>(first, last, columns, row_of, panel);
        const Right right{panel, kPanel, steps};
        for (std::int64_t n = 0; n < outputs; n += kTileRows) {
          const int some = static_cast<int>(smaller(kTileRows, outputs - n));
          const PackedLeft tile_left{left + n * steps};
          float* const to = dw + n * p.k + k;
          if (columns == kPanel) {
            // The tile after the next: with few rows a tile ends before the lines it writes have come.
            for (std::int64_t r = 2 * kTileRows; r < smaller(3 * kTileRows, outputs - n); ++r) {
              for (std::int64_t c = 0; c < kPanel; c += kLanes) __builtin_prefetch(to + r * p.k + c, 1);
            }
            tile_of<Step>(some, kPanel / kLanes, tile_left, right, to, p.k, resume);
            continue;
          }
          float sums[kTileRows * kPanel];
          const auto bytes = static_cast<std::size_t>(columns) * 4;
          for (int r = 0; resume && r < some; ++r) __builtin_memcpy(sums + r * kPanel, to + r * p.k, bytes);
          tile_of<Step>(some, static_cast<int>(parts(columns, kLanes)), tile_left, right, sums, kPanel, resume);
          for (int r = 0; r < some; ++r) __builtin_memcpy(to + r * p.k, sums + r * kPanel, bytes);
        }
      }
    }
  });
}

inline void gemm_tn(const GemmTN& p, Pool& pool) {
  p.rows.dtype == DType::bf16 ? tn<Bf16, std::uint16_t>(p, pool) : tn<F32, float>(p, pool);
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
