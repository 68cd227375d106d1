// Turns a context of bytes into a vector: the sum of one learnt vector for each (place, byte).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <expar/optimizer.h>

namespace expar {

/// A table [C, 256, H]; place c is the byte that stands C - c before the target. Every rank reads the whole table, and
/// rank r alone trains its places floor(r C / P) ... floor((r + 1) C / P) - 1.
class Embedding {
 public:
  /// Not collective. `dtype`: of the rows that forward gives and of the table that it reads (f32 or bf16).
  Embedding(const Context& context, std::int64_t places, std::int64_t hidden, DType dtype);

  /// Normal; the nearer a place, the larger. The sum of C rows has deviation 1. Collective.
  void initialise(const Context& context, std::uint64_t seed);

  /// x[t] = sum over places c of table[c, contexts[t, c]], in order, in f32, rounded once. Not collective.
  ///   contexts : [T, C]
  ///   x        : [T, H]
  void forward(const Context& context, std::span<const std::uint8_t> contexts, Tensor x);

  /// The gradient of this rank's places: rows of dx summed in the order of the global batch's B tokens.
  ///   contexts : [B, C] of the whole batch
  ///   dx       : [T, H] of this rank's tokens
  /// Collective. Cost: one read of the batch's dx per rank; B C / P row additions.
  void backward(const Context& context, std::span<const std::uint8_t> contexts, ConstTensor dx);

  /// This rank's places. Call gather() after they have changed.
  Parameter parameter();
  /// Brings the whole table to every rank. Collective. Cost: one read of the table per rank.
  void gather(const Context& context);

 private:
  std::int64_t local_places() const { return last_ - first_; }

  std::int64_t places_, hidden_;
  DType dtype_;
  std::int64_t first_, last_;    // this rank's places
  Array part_, low_, gradient_;  // [last - first, 256, H]
  Array table_;                  // [C, 256, H]
  Buffer batch_dx_, wide_dx_;
  std::vector<const void*> rows_;  // [T, C]
};

}  // namespace expar
