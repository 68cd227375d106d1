// A rank's share of a workload, and what it must find after dispatch and combine.
#pragma once

#include <cstdint>
#include <vector>

#include <expar/dispatch.h>

#include "tests/contract/routes.h"
#include "tests/elements.h"

namespace expar::test {

/// This rank's share of a workload.
struct Share {
  Share(const Workload& w, int rank, DType dtype)
      : ids(w.ids(rank)),
        x(dtype, Shape{w.tokens[static_cast<std::size_t>(rank)], w.hidden}),
        weights(DType::f32, Shape{x.view().size(0), w.topk}),
        out(dtype, x.view().shape()) {
    for (std::int64_t t = 0; t < x.view().size(0); ++t) {
      for (std::int64_t h = 0; h < w.hidden; ++h) set(x, t * w.hidden + h, w.x(rank, t, h));
      for (std::int64_t k = 0; k < w.topk; ++k) weights.as<float>()[t * w.topk + k] = w.weight(rank, t, k);
    }
  }
  ConstTensor id_tensor(const Workload& w) const { return {ids.data(), Shape{x.view().size(0), w.topk}}; }

  std::vector<std::int32_t> ids;
  Array x, weights, out;
};

/// The plan of `share`: bounded, or exact where there is no bound.
inline Plan plan_of(const Context& context, const Workload& w, const Share& share, std::int64_t bound) {
  const PlanOptions options{.experts = w.experts, .first_experts = w.first_experts};
  return bound > 0 ? make_bounded_plan(context, share.id_tensor(w), bound, options)
                   : make_plan(context, share.id_tensor(w), options);
}

/// One entry of the global order of an expert's rows.
struct Expected {
  int source;
  std::int64_t token, slot;
};

/// The rows of each expert in that order.
inline std::vector<std::vector<Expected>> rows_by_expert(const Workload& w) {
  std::vector<std::vector<Expected>> rows(static_cast<std::size_t>(w.experts));
  for (int s = 0; s < w.ranks; ++s) {
    const auto ids = w.ids(s);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const auto slot = static_cast<std::int64_t>(i);
      if (ids[i] >= 0) rows[static_cast<std::size_t>(ids[i])].push_back({s, slot / w.topk, slot % w.topk});
    }
  }
  return rows;
}

/// Row i of the inbox's list, as bytes.
inline const std::byte* row_bytes(const Inbox& inbox, std::int64_t i) {
  const Rows rows = inbox.expert_rows();
  const RowRef ref = rows.refs[i];
  return static_cast<const std::byte*>(rows.base[ref.base]) +
         static_cast<std::size_t>(ref.row * rows.width) * size_of(rows.dtype);
}

/// Each local expert sees exactly its rows, in (source rank, token, slot) order, with their weights.
inline void check_rows(const Workload& w, const Inbox& inbox) {
  const Plan& plan = inbox.plan();
  const ExpertRange local = plan.local();
  const auto by_expert = rows_by_expert(w);
  for (std::int64_t e = 0; e < local.count; ++e) {
    const auto& expected = by_expert[static_cast<std::size_t>(local.first + e)];
    require_equal(plan.rows()[static_cast<std::size_t>(e)], static_cast<std::int64_t>(expected.size()),
                  "rows of an expert");
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const std::int64_t position = plan.offsets()[static_cast<std::size_t>(e)] + static_cast<std::int64_t>(i);
      const auto& [source, token, slot] = expected[i];
      require_equal(inbox.weights()[static_cast<std::size_t>(position)], w.weight(source, token, slot), "a weight");
      const ConstTensor row(row_bytes(inbox, position), inbox.rows().dtype(), Shape{w.hidden});
      for (std::int64_t h = 0; h < w.hidden; ++h) require_equal(value(row, h), w.x(source, token, h), "an element");
    }
  }
}

/// `out` where experts multiply by one more than their number.
inline void check_out(const Workload& w, const Share& share, int rank, bool weighted) {
  const DType dtype = share.x.view().dtype();
  for (std::int64_t t = 0; t < share.x.view().size(0); ++t) {
    for (std::int64_t h = 0; h < w.hidden; ++h) {
      float sum = 0;
      for (std::int64_t k = 0; k < w.topk; ++k) {
        const std::int32_t e = share.ids[static_cast<std::size_t>(t * w.topk + k)];
        if (e < 0) continue;
        const float y = rounded(w.x(rank, t, h) * static_cast<float>(e + 1), dtype);
        sum += y * (weighted ? w.weight(rank, t, k) : 1.0F);
      }
      require_equal(value(share.out, t * w.hidden + h), rounded(sum, dtype), "a combined element");
    }
  }
}

}  // namespace expar::test
