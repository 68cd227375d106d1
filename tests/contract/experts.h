// Experts that a test can work out by itself, for rows in any layout.
#pragma once

#include <cstdint>
#include <vector>

#include <expar/dispatch.h>

#include "tests/contract/share.h"

namespace expar::test {

/// Rows of one expert that stand together, those of one source or of all.
struct Stretch {
  std::int64_t expert, first, count;
};

/// As a caller's kernel finds them, from offsets() and rows() alone.
inline std::vector<Stretch> stretches(const Inbox& inbox) {
  const std::int64_t local = inbox.plan().local().count;
  const auto offsets = inbox.offsets();
  std::vector<Stretch> all;
  for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
    const auto e = static_cast<std::int64_t>(i) % local;
    const std::int64_t room = offsets[i + 1] - offsets[i];
    const bool by_rank = inbox.layout() == Layout::rank_major;
    all.push_back({e, offsets[i], by_rank ? room : inbox.plan().rows()[i]});
  }
  return all;
}

/// Writes expert(number, x) for every element x of every row; rows between get a value that would be noticed.
template <class Expert>
void run_experts(const Inbox& inbox, Outbox& y, Expert expert) {
  const Tensor out = y.rows();
  const std::int64_t width = inbox.rows().size(1);
  for (std::int64_t i = 0; i < out.elements(); ++i) set(out, i, 1e30F);
  const auto x = [&](std::int64_t row, std::int64_t h) {
    if (inbox.layout() != Layout::indexed) return value(inbox.packed(), row * width + h);
    return value(ConstTensor(row_bytes(inbox, row), out.dtype(), {width}), h);
  };
  for (const auto& [local, first, count] : stretches(inbox)) {
    for (std::int64_t row = first; row < first + count; ++row) {
      for (std::int64_t h = 0; h < width; ++h)
        set(out, row * width + h, expert(inbox.plan().local().first + local, x(row, h)));
    }
  }
}

/// Each multiplies by one more than its number: see check_out.
inline void multiply(const Inbox& inbox, Outbox& y) {
  run_experts(inbox, y, [](std::int64_t expert, float x) { return x * static_cast<float>(expert + 1); });
}

}  // namespace expar::test
