// The grouped products y = x w^T and dx = dy w: panels of columns, tiles of gathered rows.
#pragma once

#include "backends/cpu/number.h"
#include "backends/cpu/pack.h"
#include "backends/cpu/work.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

// A chunk of a panel is 256 KiB, which leaves room beside it in an L2 cache of 1 MiB.
constexpr std::int64_t kChunkWords = 1024;
constexpr std::int64_t kPackedWords = 256;        // 64 KiB, for panels that are packed just before they are read
constexpr std::int64_t kBlockRows = 240;          // their sums fill 60 KiB
constexpr std::int64_t kFewRows = 4 * kTileRows;  // from here on, fetching the next chunk while summing pays

constexpr std::int64_t kShortRow = 4096;

/// Where finished sums go: rounded once, after the bias.
struct Result {
  void* data;
  DType dtype;
  std::int64_t width;

  void write(const float* sums, const float* bias, float weight, std::int64_t count, std::int64_t row,
             std::int64_t column) const {
    const std::int64_t at = row * width + column;
    if (dtype == DType::bf16) {
      write_row(sums, bias, weight, count, static_cast<std::uint16_t*>(data) + at);
    } else {
      write_row(sums, bias, weight, count, static_cast<float*>(data) + at);
    }
  }

 private:
  template <class E>
  static void write_row(const float* sums, const float* bias, float weight, std::int64_t count, E* to) {
    if (bias == nullptr) {
      for (std::int64_t c = 0; c < count; ++c) to[c] = narrow<E>(sums[c]);
    } else {
      for (std::int64_t c = 0; c < count; ++c) to[c] = narrow<E>(fma(weight, bias[c], sums[c]));
    }
  }
};

/// What row i's bias is multiplied by.
inline float bias_weight(const GemmNT& p, std::int64_t i) { return p.bias_weights ? p.bias_weights[i] : 1.0F; }

/// Rows by pointer times one chunk of a panel. ahead(r, tile) tells what to fetch while rows from r on are summed.
template <class Step, class Ahead>
void sum_block(const std::byte* const* rows, std::int64_t count, const Chunk& chunk, int vectors, Right right,
               const Ahead& ahead, float* sums, std::int64_t stride, bool resume) {
  const std::int64_t height = tile_height(count);
  right.steps = chunk.steps;
  right.tail = chunk.tail;
  for (std::int64_t r = 0, tile = 0; r < count; r += height, ++tile) {
    RowsLeft left;
    const std::int64_t some = smaller(height, count - r);
    for (std::int64_t i = 0; i < some; ++i) left.row[i] = rows[r + i] + 4 * chunk.first;
    right.ahead = ahead(r, tile);
    tile_of<Step>(static_cast<int>(some), vectors, left, right, sums + r * stride, stride, resume);
  }
}

// ---- y = x w^T, weights packed: [N / 64][K words][64] -------------------------------------------------

template <class Step>
void nt_packed(const GemmNT& p, Pool& pool) {
  const Cut cut(p.groups, p.n, pool.threads());
  const Chunks chunks(p.k, Step::kPerWord, kChunkWords);
  const std::int64_t panel_words = parts(p.k, Step::kPerWord) * kPanel;
  const Result result{p.y, p.y_dtype, p.n};
  pool.run(cut.tasks, [&](std::int64_t task, int worker) {
    const int g = cut.group(task);
    const std::int64_t begin = p.groups.offsets[g], end = p.groups.offsets[g + 1];
    if (begin == end) return;
    const FloatMode mode;
    const std::int64_t n0 = cut.first(task), n1 = cut.last(task, p.n);
    const Word* const weights = static_cast<const Word*>(p.w.data) + g * cut.panels * panel_words;
    const Word* const stop = weights + parts(n1, kPanel) * panel_words;
    float* const sums = Slices(pool.scratch(worker, kBlockRows * kPanel * 4)).take<float>(kBlockRows * kPanel);
    for (std::int64_t i = begin; i < end; i += kBlockRows) {
      const std::int64_t count = smaller(kBlockRows, end - i);
      const std::byte* rows[kBlockRows];
      for (std::int64_t r = 0; r < count; ++r) rows[r] = row_at(p.rows, i + r);
      for (std::int64_t n = n0; n < n1; n += kPanel) {
        const Word* const panel = weights + n / kPanel * panel_words;
        for (std::int64_t c = 0; c < chunks.count(); ++c) {
          const Chunk chunk = chunks[c];
          const Right right{panel + chunk.first * kPanel, kPanel};
          const Word* const next = right.words + (chunk.steps + chunk.tail) * kPanel;
          // A step reads 256 bytes and fetches 64, so four tiles fetch the next chunk, a quarter each.
          const bool fetch = count >= kFewRows && next < stop;
          const auto ahead = [&](std::int64_t, std::int64_t tile) {
            return fetch && tile < 4 ? reinterpret_cast<const std::byte*>(next) + tile * chunk.steps * 64 : nullptr;
          };
          sum_block<Step>(rows, count, chunk, kPanel / kLanes, right, ahead, sums, kPanel, c > 0);
        }
        const float* const bias = p.bias ? p.bias + g * p.n + n : nullptr;
        for (std::int64_t r = 0; r < count; ++r) {
          result.write(sums + r * kPanel, bias, bias_weight(p, i + r), smaller(kPanel, p.n - n), i + r, n);
        }
      }
    }
  });
}

// ---- y = x w^T, plain weights: y^T = w x^T, so that the few rows are packed and the weights are not ------

template <class Step>
void nt_plain(const GemmNT& p, Pool& pool) {
  const Cut cut(p.groups, p.n, pool.threads());
  const Chunks chunks(p.k, Step::kPerWord, kChunkWords);
  const std::int64_t weight_bytes = p.k * size_of_element(p.w.dtype);
  const Result result{p.y, p.y_dtype, p.n};
  pool.run(cut.tasks, [&](std::int64_t task, int worker) {
    const int g = cut.group(task);
    const std::int64_t begin = p.groups.offsets[g], end = p.groups.offsets[g + 1];
    if (begin == end) return;
    const FloatMode mode;
    const std::int64_t n0 = cut.first(task), n1 = cut.last(task, p.n), outputs = n1 - n0;
    const std::int64_t longest = chunks[0].steps + 1;
    // Rounded up to whole vectors of outputs, which the last transpose reads.
    const std::int64_t sum_rows = parts(outputs, kLanes) * kLanes;
    Slices slices(pool.scratch(worker, static_cast<std::size_t>((longest + sum_rows) * kPanel * 4 + 128)));
    Word* const packed = slices.take<Word>(longest * kPanel);
    float* const sums = slices.take<float>(sum_rows * kPanel);
    const std::byte* weights[256];
    for (std::int64_t n = 0; n < outputs; ++n) {
      weights[n] = static_cast<const std::byte*>(p.w.data) + (g * p.n + n0 + n) * weight_bytes;
    }
    // Short rows of weights end before the processor has learnt to fetch ahead, so the rows of the next tile, which lie
    // behind those of this one, are fetched here.
    const bool fetch = weight_bytes <= kShortRow;
    const auto ahead = [&](std::int64_t r, std::int64_t) {
      return fetch && r + kTileRows < outputs ? weights[r + kTileRows] : nullptr;
    };
    for (std::int64_t i = begin; i < end; i += kPanel) {
      const std::int64_t count = smaller(kPanel, end - i);
      const int vectors = static_cast<int>(parts(count, kLanes));
      const std::int64_t stride = vectors * kLanes;
      const std::byte* rows[kPanel];
      for (std::int64_t r = 0; r < count; ++r) rows[r] = row_at(p.rows, i + r);
      for (std::int64_t c = 0; c < chunks.count(); ++c) {
        pack_transposed(rows, count, vectors, chunks[c], packed);
        sum_block<Step>(weights, outputs, chunks[c], vectors, {packed, stride}, ahead, sums, stride, c > 0);
      }
      for (std::int64_t n = 0; n < outputs; n += kLanes) {
        const std::int64_t some = smaller(kLanes, outputs - n);
        const float* const bias = p.bias ? p.bias + g * p.n + n0 + n : nullptr;
        for (std::int64_t r = 0; r < count; r += kLanes) {
          float turned[kLanes * kLanes];
          const std::byte* at[kLanes];
          for (std::int64_t j = 0; j < kLanes; ++j) {
            at[j] = reinterpret_cast<const std::byte*>(sums + (n + (j < some ? j : 0)) * stride + r);
          }
          transpose(at, reinterpret_cast<Word*>(turned), kLanes);
          for (std::int64_t j = 0; j < smaller(kLanes, count - r); ++j) {
            result.write(turned + j * kLanes, bias, bias_weight(p, i + r + j), some, i + r + j, n0 + n);
          }
        }
      }
    }
  });
}

// ---- dx = dy w --------------------------------------------------------------------------------------

template <class Step>
void nn(const GemmNN& p, Pool& pool) {
  const Cut cut(p.groups, p.k, pool.threads());
  const Chunks chunks(p.n, Step::kPerWord, kPackedWords);
  const std::int64_t size = size_of_element(p.w.dtype);
  const Result result{p.dx, p.dx_dtype, p.k};
  pool.run(cut.tasks, [&](std::int64_t task, int worker) {
    const int g = cut.group(task);
    const std::int64_t begin = p.groups.offsets[g], end = p.groups.offsets[g + 1];
    if (begin == end) return;
    const FloatMode mode;
    const std::int64_t longest = chunks[0].steps + 1;
    Slices slices(pool.scratch(worker, static_cast<std::size_t>((longest + kBlockRows) * kPanel * 4 + 128)));
    Word* const packed = slices.take<Word>(longest * kPanel);
    float* const sums = slices.take<float>(kBlockRows * kPanel);
    for (std::int64_t k = cut.first(task); k < cut.last(task, p.k); k += kPanel) {
      const std::int64_t columns = smaller(kPanel, p.k - k);
      const std::byte* const weights = static_cast<const std::byte*>(p.w.data) + (g * p.n * p.k + k) * size;
      const auto weight_row = [&](std::int64_t n) { return weights + n * p.k * size; };
      for (std::int64_t i = begin; i < end; i += kBlockRows) {
        const std::int64_t count = smaller(kBlockRows, end - i);
        const std::byte* rows[kBlockRows];
        for (std::int64_t r = 0; r < count; ++r) {
          rows[r] = static_cast<const std::byte*>(p.dy) + (i + r) * p.n * size;
        }
        for (std::int64_t c = 0; c < chunks.count(); ++c) {
          const Chunk chunk = chunks[c];
          const std::int64_t n0 = chunk.first * Step::kPerWord;
          const std::int64_t n1 = n0 + chunk.steps * Step::kPerWord + chunk.tail;
          if (i == begin || chunks.count() > 1) pack_rows<Step>(n0, n1, columns, weight_row, packed);
          // The next chunk lies below this one; below the last, the next panel starts again at the top, to the right. A
          // step joins rows of 256 bytes in all, of which each of four tiles fetches a line.
          const bool more = c + 1 < chunks.count() || k + kPanel < cut.last(task, p.k);
          const std::byte* const next = c + 1 < chunks.count() ? weight_row(n1) : weights + kPanel * size;
          const auto ahead = [&](std::int64_t, std::int64_t tile) -> const std::byte* {
            if (count < kFewRows || !more || tile >= 4) return nullptr;
            const std::int64_t line = tile * 64;
            return next + line / (kPanel * size) * p.k * size + line % (kPanel * size);
          };
          const Right right{.words = packed, .stride = kPanel, .ahead_stride = Step::kPerWord * p.k * size};
          sum_block<Step>(rows, count, chunk, kPanel / kLanes, right, ahead, sums, kPanel, c > 0);
        }
        for (std::int64_t r = 0; r < count; ++r) result.write(sums + r * kPanel, nullptr, 1.0F, columns, i + r, k);
      }
    }
  });
}

// ---- The entries of the table -----------------------------------------------------------------------

inline void gemm_nt(const GemmNT& p, Pool& pool) {
  if (p.w.dtype == DType::bf16) {
    p.w.packed ? nt_packed<Bf16>(p, pool) : nt_plain<Bf16>(p, pool);
  } else {
    p.w.packed ? nt_packed<F32>(p, pool) : nt_plain<F32>(p, pool);
  }
}

inline void gemm_nn(const GemmNN& p, Pool& pool) { p.w.dtype == DType::bf16 ? nn<Bf16>(p, pool) : nn<F32>(p, pool); }

inline std::int64_t packed_bytes(DType dtype, std::int64_t n, std::int64_t k) {
  return parts(n, kPanel) * kPanel * parts(k, dtype == DType::bf16 ? 2 : 1) * 4;
}

inline void pack(DType dtype, int groups, std::int64_t n, std::int64_t k, const void* w, void* packed, Pool& pool) {
  const std::int64_t panels = parts(n, kPanel), per_word = dtype == DType::bf16 ? 2 : 1;
  const std::int64_t row_bytes = k * size_of_element(dtype);
  const Chunk all{0, k / per_word, k % per_word != 0};
  pool.run(groups * panels, [&](std::int64_t task, int) {
    const std::int64_t first = task % panels * kPanel, count = smaller(kPanel, n - first);
    const std::byte* rows[kPanel];
    for (std::int64_t r = 0; r < count; ++r) {
      rows[r] = static_cast<const std::byte*>(w) + (task / panels * n + first + r) * row_bytes;
    }
    pack_transposed(rows, count, kPanel / kLanes, all, static_cast<Word*>(packed) + task * parts(k, per_word) * kPanel);
  });
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
