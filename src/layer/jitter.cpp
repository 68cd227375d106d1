// Multiplies what the router reads by numbers near one, which depend on the token and not on P.
#include "src/layer/jitter.h"

#include <algorithm>

#include "src/util/ranges.h"

namespace expar {
namespace {

constexpr std::int64_t kGrain = 64;  // tokens per task

}  // namespace

void Jitter::apply(const Tensor& rows, Pool& pool) const {
  const std::int64_t width = rows.size(1);
  const std::int8_t* valid = mask.absent() ? nullptr : mask.as<std::int8_t>();
  for_ranges(pool, rows.size(0), kGrain, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t padding = valid == nullptr ? 0 : std::count(valid, valid + begin, std::int8_t{0});
    auto index = static_cast<std::uint64_t>((first_token + begin - padding) * width);
    float* row = rows.as<float>() + begin * width;
    for (std::int64_t t = begin; t < end; ++t, row += width) {
      if (valid != nullptr && valid[t] == 0) continue;
      for (std::int64_t h = 0; h < width; ++h) row[h] *= 1.0F + most * (2.0F * random.uniform(index++) - 1.0F);
    }
  });
}

}  // namespace expar
