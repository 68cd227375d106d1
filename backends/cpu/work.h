// How kernels choose their element and cut their work for the pool, and the memory a worker cuts its scratch into.
#pragma once

#include <expar/kernels.h>

#include "backends/cpu/word.h"
#include "src/util/processor.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

/// Calls body(E{}) with the element type of `dtype`.
template <class Body>
void with_element(DType dtype, const Body& body) {
  if (dtype == DType::bf16) {
    body(std::uint16_t{});
  } else {
    body(float{});
  }
}

/// Below this many bytes a second thread costs more to wake than it saves.
constexpr std::int64_t kTaskBytes = 32 << 10;

/// Calls body(first, last) for blocks of [0, count), each of about kTaskBytes at `bytes` per index.
template <class Body>
void for_blocks(Pool& pool, std::int64_t count, std::int64_t bytes, const Body& body) {
  const std::int64_t block = larger(1, kTaskBytes / larger(bytes, 1));
  pool.run(parts(count, block), [&](std::int64_t task, int) {
    const FloatMode mode;
    body(task * block, smaller((task + 1) * block, count));
  });
}

/// The columns of a grouped product in panels of 64, several to a task; tasks claim (group, panels) in order.
struct Cut {
  Cut(const Groups& groups, std::int64_t columns, int threads) : panels(parts(columns, 64)) {
    std::int64_t busy = 0;
    for (int g = 0; g < groups.count; ++g) busy += groups.offsets[g + 1] > groups.offsets[g];
    // Eight tasks for each thread even out groups of unequal size; four panels share what a task packs.
    per_task = smaller(larger(busy * panels / (8 * threads), 1), 4);
    tasks_per_group = parts(panels, per_task);
    tasks = groups.count * tasks_per_group;
  }
  int group(std::int64_t task) const { return static_cast<int>(task / tasks_per_group); }
  std::int64_t first(std::int64_t task) const { return task % tasks_per_group * per_task * 64; }
  std::int64_t last(std::int64_t task, std::int64_t columns) const {
    return smaller(first(task) + per_task * 64, columns);
  }

  std::int64_t panels, per_task = 1, tasks_per_group = 0, tasks = 0;
};

/// Hands out pieces of a worker's scratch, each on its own cache line.
class Slices {
 public:
  explicit Slices(std::byte* memory) : next_(memory) {}
  template <class T>
  T* take(std::int64_t count) {
    std::byte* const piece = next_;
    next_ += parts(count * static_cast<std::int64_t>(sizeof(T)), 64) * 64;
    return reinterpret_cast<T*>(piece);
  }

 private:
  std::byte* next_;
};

inline std::int64_t size_of_element(DType dtype) { return dtype == DType::bf16 ? 2 : 4; }

/// Where row i of a gathered operand lies.
inline const std::byte* row_at(const Rows& rows, std::int64_t i) {
  const std::int64_t bytes = rows.width * size_of_element(rows.dtype);
  if (rows.refs == nullptr) return static_cast<const std::byte*>(rows.base[0]) + i * bytes;
  return static_cast<const std::byte*>(rows.base[rows.refs[i].base]) + rows.refs[i].row * bytes;
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
