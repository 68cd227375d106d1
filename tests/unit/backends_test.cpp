// Backends as callers get them: no entry is ever empty.
#include <array>
#include <bit>
#include <cstddef>

#include <expar/registry.h>
#include <gtest/gtest.h>

#include "src/util/fallback.h"

namespace expar {
namespace {

/// A table as its words, whatever entries it has: the name, the instruction set, then kernels.
using Words = std::array<const void*, sizeof(Kernels) / sizeof(void*)>;
constexpr std::size_t kNames = 2;

Words words_of(const Kernels& table) { return std::bit_cast<Words>(table); }

TEST(Backends, take_every_entry_they_lack_from_the_reference) {
  const Kernels reference = find_kernels("reference");
  const Words full = words_of(reference), taken = words_of(with_fallback({}, reference));
  for (std::size_t i = kNames; i < full.size(); ++i) {
    EXPECT_NE(taken[i], nullptr) << "entry " << i;
    EXPECT_EQ(taken[i], full[i]) << "entry " << i;
  }
}

TEST(Backends, keep_the_entries_they_have) {
  const Kernels reference = find_kernels("reference");
  for (const std::string& isa : available_isas("cpu")) {
    const Kernels table = find_kernels("cpu", isa);
    EXPECT_EQ(words_of(with_fallback(table, reference)), words_of(table)) << isa;
  }
}

TEST(Backends, pack_weights_for_the_gemm_that_reads_them) {
  const Kernels reference = find_kernels("reference");
  Kernels half = find_kernels("cpu");
  half.pack = nullptr;
  EXPECT_EQ(with_fallback(half, reference).packed_bytes, reference.packed_bytes);
  EXPECT_EQ(with_fallback(half, reference).pack, reference.pack);
}

}  // namespace
}  // namespace expar
