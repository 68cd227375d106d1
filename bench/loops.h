// The loops behind the limits, one file for each kind of processor. Those files are compiled for instructions that
// other processors lack, so they include nothing whose code the rest of the program could take from them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace expar::bench {

/// The fastest loops that this processor runs.
struct Loops {
  /// Reads all bytes once; the value keeps the compiler from leaving it out.
  std::uint64_t (*read)(const std::byte* data, std::size_t bytes);
  /// Multiplies and adds in registers; returns how many operations (two each) that were.
  double (*flops_f32)(std::int64_t rounds, float* sink);
  double (*flops_bf16)(std::int64_t rounds, float* sink);
};
Loops fastest_loops();

// One of each file loops_*.cpp; null entries take the next slower file's.
Loops portable_loops();
Loops avx2_loops();
Loops avx512_loops();
Loops avx512_bf16_loops();

}  // namespace expar::bench
