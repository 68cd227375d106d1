// What parameters begin with.
#include "src/layer/draw.h"

#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include <expar/random.h>

#include "src/util/ranges.h"

namespace expar {
namespace {

constexpr std::int64_t kGrain = 4096;  // numbers per task: a tenth of a millisecond

}  // namespace

void draw(const MatrixPart& part, const Tensor& values, std::uint64_t seed, const std::string& stream, Pool& pool) {
  const Random random(seed, stream);
  const auto deviation = static_cast<float>(1.0 / std::sqrt(static_cast<double>(part.whole[1])));
  const std::int64_t columns = part.columns.count;
  for_ranges(pool, part.shape()[0], 1 + kGrain / columns, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      const auto first = static_cast<std::uint64_t>(part.start(r));
      float* const row = values.as<float>() + r * columns;
      for (std::int64_t c = 0; c < columns; ++c) {
        row[c] = deviation * random.normal(first + static_cast<std::uint64_t>(c));
      }
    }
  });
}

void draw_token_table(const Tensor& table, std::int64_t experts, std::uint64_t seed, const std::string& stream) {
  const Random random(seed, stream);
  std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
  std::uint64_t drawn = 0;
  for (std::int64_t token = 0; token < table.size(0); ++token) {
    std::iota(order.begin(), order.end(), 0);
    for (std::int64_t k = 0; k < table.size(1); ++k) {
      const auto left = static_cast<std::uint64_t>(experts - k);
      std::swap(order[static_cast<std::size_t>(k)],
                order[static_cast<std::size_t>(k) + static_cast<std::size_t>(random.bits(drawn++) % left)]);
      table.as<std::int32_t>()[token * table.size(1) + k] = order[static_cast<std::size_t>(k)];
    }
  }
}

}  // namespace expar
