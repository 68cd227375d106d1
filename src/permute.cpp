// From rank-major to expert-major rows and back.
#include <expar/permute.h>

#include <limits>
#include <string>

#include "src/util/check.h"
#include "src/util/copy.h"

namespace expar {
namespace {

/// Where each of `order` stands. Throws unless it is each of 0 to N - 1 once.
std::vector<std::int32_t> inverse(std::span<const std::int32_t> order) {
  std::vector<std::int32_t> places(order.size(), -1);
  for (std::size_t i = 0; i < order.size(); ++i) {
    const auto index = [&] { return "indices[" + std::to_string(i) + "] = " + std::to_string(order[i]); };
    if (order[i] < 0 || at(order[i]) >= order.size()) {
      refuse(index() + " is none of the " + std::to_string(order.size()) + " rows");
    }
    std::int32_t& place = places[at(order[i])];
    if (place >= 0) refuse(index() + " is there twice, the first time at " + std::to_string(place));
    place = static_cast<std::int32_t>(i);
  }
  return places;
}

void copy(ConstTensor rows, std::span<const std::int32_t> order, Tensor out) {
  if (rows.shape().rank() == 0 || rows.dtype() != out.dtype() || rows.shape() != out.shape()) {
    refuse("rows are " + shown(rows) + ", out is " + shown(out));
  }
  if (at(rows.size(0)) != order.size()) {
    refuse(std::to_string(order.size()) + " indices for " + std::to_string(rows.size(0)) + " rows");
  }
  if (order.empty()) return;
  copy_rows(out.bytes(), rows.bytes(), order, rows.byte_size() / order.size(), Store::cached);
}

}  // namespace

ExpertMajor expert_major(std::span<const std::int64_t> counts, int ranks) {
  if (ranks < 1 || counts.size() % at(ranks) != 0) {
    refuse(std::to_string(counts.size()) + " counts are not those of " + std::to_string(ranks) + " ranks");
  }
  std::vector<std::int64_t> first;  // of each rank and expert, rank-major
  std::int64_t rows = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] < 0) refuse("counts[" + std::to_string(i) + "] = " + std::to_string(counts[i]) + " is below 0");
    first.push_back(rows);
    if (counts[i] > std::numeric_limits<std::int32_t>::max() - rows) refuse("the counts are more than 2^31 - 1 rows");
    rows += counts[i];
  }
  const std::size_t experts = counts.size() / at(ranks);
  ExpertMajor order{.indices = {}, .rows = std::vector<std::int64_t>(experts, 0)};
  order.indices.reserve(at(rows));
  for (std::size_t e = 0; e < experts; ++e) {
    for (std::size_t piece = e; piece < counts.size(); piece += experts) {
      for (std::int64_t i = 0; i < counts[piece]; ++i) {
        order.indices.push_back(static_cast<std::int32_t>(first[piece] + i));
      }
      order.rows[e] += counts[piece];
    }
  }
  return order;
}

void permute_rows(ConstTensor rows, std::span<const std::int32_t> indices, Tensor out) {
  inverse(indices);
  copy(rows, indices, out);
}

void unpermute_rows(ConstTensor rows, std::span<const std::int32_t> indices, Tensor out) {
  copy(rows, inverse(indices), out);
}

}  // namespace expar
