// Words: one f32 or a pair of bf16, the unit in which operands are moved, packed and broadcast.
#pragma once

#include <cstddef>
#include <cstdint>

// Everything that is compiled for an instruction set lives in that set's namespace and has internal linkage, and calls
// no template or inline function of the standard library: the linker keeps one copy of such a function for the
// whole program, and it could be the one with instructions that another processor lacks.
namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

using Word = std::uint32_t;

inline Word load_word(const std::byte* from) {
  Word w;
  __builtin_memcpy(&w, from, sizeof w);
  return w;
}
/// The last bf16 of a row of odd length, with zero as its partner.
inline Word load_half(const std::byte* from) {
  std::uint16_t half;
  __builtin_memcpy(&half, from, sizeof half);
  return half;
}

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a < b ? b : a; }
/// a / b rounded up.
inline std::int64_t parts(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
