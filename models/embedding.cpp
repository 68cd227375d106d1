// The table of byte vectors: each rank trains its places and reads all.
#include "models/embedding.h"

#include <algorithm>
#include <cmath>

#include <expar/collectives.h>
#include <expar/random.h>

namespace expar {
namespace {

constexpr std::int64_t kBytes = 256;

// In inverse proportion to the distance from the target: were all alike, far bytes would drown the near ones, which say
// more, until training has quietened them.
float deviation(std::int64_t places, std::int64_t place) {
  double squares = 0;
  for (std::int64_t distance = 1; distance <= places; ++distance)
    squares += 1.0 / static_cast<double>(distance * distance);
  return static_cast<float>(1.0 / (static_cast<double>(places - place) * std::sqrt(squares)));
}

}  // namespace

Embedding::Embedding(const Context& context, std::int64_t places, std::int64_t hidden, DType dtype)
    : places_(places),
      hidden_(hidden),
      dtype_(dtype),
      first_(context.rank() * places / context.size()),
      last_((context.rank() + 1) * places / context.size()),
      part_(DType::f32, {local_places(), kBytes, hidden}),
      gradient_(DType::f32, {local_places(), kBytes, hidden}),
      table_(dtype, {places, kBytes, hidden}) {
  if (dtype == DType::bf16) low_ = Array(dtype, {local_places(), kBytes, hidden});
}

void Embedding::initialise(const Context& context, std::uint64_t seed) {
  const Random random(seed, "embedding");
  const std::int64_t each = kBytes * hidden_;
  context.pool().run(local_places(), [&](std::int64_t local, int) {
    const std::int64_t place = first_ + local;
    const float scale = deviation(places_, place);
    for (std::int64_t i = 0; i < each; ++i) {
      const float value = scale * random.normal(static_cast<std::uint64_t>(place * each + i));
      part_.as<float>()[local * each + i] = value;
      if (low_) low_.as<bf16>()[local * each + i] = bf16(value);
    }
  });
  gather(context);
}

void Embedding::gather(const Context& context) { all_gather(context, low_ ? low_.view() : part_.view(), table_); }

void Embedding::forward(const Context& context, std::span<const std::uint8_t> contexts, Tensor x) {
  const Phase phase(context.trace(), "embedding");
  const std::int64_t row_bytes = hidden_ * static_cast<std::int64_t>(size_of(dtype_));
  rows_.resize(contexts.size());
  const std::byte* place_rows = table_.view().bytes();
  for (std::size_t i = 0; i < contexts.size(); ++i) {
    const std::int64_t row = static_cast<std::int64_t>(i) % places_ * kBytes + contexts[i];
    rows_[i] = place_rows + row * row_bytes;
  }
  context.kernels().reduce(
      {.tokens = x.size(0), .topk = places_, .width = hidden_, .dtype = dtype_, .slots = rows_.data(), .out = x.data()},
      context.pool());
}

void Embedding::backward(const Context& context, std::span<const std::uint8_t> contexts, ConstTensor dx) {
  const Phase phase(context.trace(), "embedding");
  const auto tokens = static_cast<std::int64_t>(contexts.size()) / places_;
  const Tensor batch = batch_dx_.view(dtype_, {tokens, hidden_});
  all_gather(context, dx, batch);
  Tensor wide = batch;
  if (dtype_ == DType::bf16) {
    wide = wide_dx_.view(DType::f32, {tokens, hidden_});
    std::transform(batch.as<bf16>(), batch.as<bf16>() + batch.elements(), wide.as<float>(),
                   [](bf16 value) { return static_cast<float>(value); });
  }
  context.pool().run(local_places(), [&](std::int64_t place, int) {
    float* sums = gradient_.as<float>() + place * kBytes * hidden_;
    std::fill_n(sums, kBytes * hidden_, 0.0F);
    const std::uint8_t* byte = contexts.data() + first_ + place;
    for (std::int64_t t = 0; t < tokens; ++t, byte += places_) {
      float* __restrict sum = sums + *byte * hidden_;
      const float* row = wide.as<float>() + t * hidden_;
      for (std::int64_t j = 0; j < hidden_; ++j) sum[j] += row[j];
    }
  });
}

Parameter Embedding::parameter() {
  return {.name = "embedding", .value = part_, .gradient = gradient_, .low = low_.view(), .decay = false};
}

}  // namespace expar
