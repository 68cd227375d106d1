// Data that can be checked anywhere without being sent there.
#include "bench/workload.h"

#include <cstring>
#include <string>

#include "bench/routes.h"
#include "bench/timing.h"

namespace expar::bench {
namespace {

/// The finaliser of MurmurHash3 (Appleby, public domain).
std::uint32_t mix(std::uint32_t h) {
  h ^= h >> 16;
  h *= 0x85ebca6bU;
  h ^= h >> 13;
  h *= 0xc2b2ae35U;
  return h ^ (h >> 16);
}

std::uint32_t seed_of(std::uint64_t row) {
  return mix(static_cast<std::uint32_t>(row)) ^ static_cast<std::uint32_t>(row >> 32);
}

/// Odd 128ths in (-1, 1): eight significant bits, and never zero.
float value(std::uint32_t seed, std::uint32_t column) {
  const auto byte = static_cast<std::int32_t>(mix(seed + column * 0x9e3779b1U) >> 25);  // 0 to 127
  return static_cast<float>(2 * byte - 127) * (1.0F / 128.0F);
}

/// Answers lie in another part of the table than tokens, and those of each slice in one of their own.
constexpr std::uint64_t kAnswers = std::uint64_t{1} << 40;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

}  // namespace

void fill_row(std::uint64_t row, DType dtype, std::int64_t width, void* out) {
  const std::uint32_t seed = seed_of(row);
  if (dtype == DType::f32) {
    auto* to = static_cast<float*>(out);
    for (std::int64_t c = 0; c < width; ++c) to[c] = value(seed, static_cast<std::uint32_t>(c));
  } else {
    auto* to = static_cast<bf16*>(out);
    for (std::int64_t c = 0; c < width; ++c) to[c] = bf16(value(seed, static_cast<std::uint32_t>(c)));
  }
}

std::int64_t count_wrong(const void* got, const void* wanted, DType dtype, std::int64_t width) {
  const std::size_t bytes = size_of(dtype);
  if (std::memcmp(got, wanted, at(width) * bytes) == 0) return 0;
  std::int64_t wrong = 0;
  for (std::size_t c = 0; c < at(width); ++c) {
    const auto* a = static_cast<const std::byte*>(got) + c * bytes;
    const auto* b = static_cast<const std::byte*>(wanted) + c * bytes;
    wrong += std::memcmp(a, b, bytes) != 0;
  }
  return wrong;
}

std::vector<std::vector<std::int64_t>> tokens_by_rank(const Parallel& ranks, std::int64_t tokens) {
  const std::int64_t replica = ranks.replicas ? ranks.replicas.rank() : 0;
  const std::vector<std::int64_t> places = gather_all(ranks.all, {replica, ranks.experts.rank()});
  std::vector<std::vector<std::int64_t>> of(at(ranks.experts.size()));
  for (std::int64_t rank = 0; rank < ranks.all.size(); ++rank) {
    if (places[at(2 * rank)] != replica) continue;
    for (std::int64_t t = 0; t < tokens; ++t) of[at(places[at(2 * rank + 1)])].push_back(rank * tokens + t);
  }
  return of;
}

Workload::Workload(const Parallel& ranks, const Options& options) : options_(options), slices_(ranks.slice_count()) {
  const std::int64_t topk = options.topk;
  const Context& context = ranks.experts;
  const std::vector<std::vector<std::int64_t>> by_rank = tokens_by_rank(ranks, options.tokens);
  tokens_ = by_rank[at(context.rank())];
  all_ids_ = make_routes(options, ranks.all.size() * options.tokens);
  const auto tokens = static_cast<std::int64_t>(tokens_.size());
  x_ = Array(options.dtype, Shape{tokens, options.hidden});
  ids_ = Array(DType::int32, Shape{tokens, topk});
  weights_ = Array(DType::f32, Shape{tokens, topk});
  const std::size_t row_bytes = at(options.hidden) * size_of(options.dtype);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t token = tokens_[at(t)];
    fill_row(static_cast<std::uint64_t>(token), options.dtype, options.hidden, x_.view().bytes() + at(t) * row_bytes);
    for (std::int64_t k = 0; k < topk; ++k) {
      ids_.as<std::int32_t>()[t * topk + k] = id(token, k);
      weights_.as<float>()[t * topk + k] = weight(token, k);
    }
  }
  const ExpertRange local = experts_of(context.rank(), context.size(), options.experts);
  arrivals_.resize(at(local.count));
  for (const std::vector<std::int64_t>& source : by_rank) {
    for (const std::int64_t token : source) {
      for (std::int64_t k = 0; k < topk; ++k) {
        const std::int64_t e = id(token, k) - local.first;
        if (e >= 0 && e < local.count) arrivals_[at(e)].push_back({token, k});
      }
    }
  }
}

ConstTensor Workload::all_ids() const {
  return {all_ids_.data(), Shape{static_cast<std::int64_t>(all_ids_.size()) / options_.topk, options_.topk}};
}

float Workload::weight(std::int64_t token, std::int64_t slot) const {
  const auto key = static_cast<std::uint32_t>(token * options_.topk + slot);
  return static_cast<float>(1 + (mix(key ^ 0x5bd1e995U) >> 28)) * (1.0F / 16.0F);
}

std::uint64_t Workload::answer_row(const Arrival& a, int slice) const {
  return kAnswers * static_cast<std::uint64_t>(slice + 1) +
         static_cast<std::uint64_t>(a.token * options_.topk + a.slot);
}

/// The rows of local expert `e` in the inbox's packed(), in the order of its list.
std::vector<std::size_t> packed_rows(const Inbox& inbox, std::size_t e) {
  const Plan& plan = inbox.plan();
  const auto offsets = inbox.offsets();
  std::vector<std::size_t> rows;
  const auto take = [&](std::int64_t first, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) rows.push_back(at(first + i));
  };
  if (inbox.layout() != Layout::rank_major) {
    take(offsets[e], plan.rows()[e]);
  } else {
    for (std::size_t i = e; i + 1 < offsets.size(); i += plan.rows().size())
      take(offsets[i], offsets[i + 1] - offsets[i]);
  }
  return rows;
}

std::int64_t count_wrong(const Workload& workload, const Inbox& inbox) {
  const Options& options = workload.options();
  const Plan& plan = inbox.plan();
  const std::size_t row_bytes = at(options.hidden) * size_of(options.dtype);
  std::vector<std::byte> wanted(row_bytes);
  std::int64_t wrong = 0;
  const Rows rows = inbox.expert_rows();
  for (std::size_t e = 0; e < workload.arrivals().size(); ++e) {
    const std::vector<Arrival>& arrivals = workload.arrivals()[e];
    if (plan.rows()[e] != static_cast<std::int64_t>(arrivals.size())) {
      wrong += options.hidden * (1 + std::abs(plan.rows()[e] - static_cast<std::int64_t>(arrivals.size())));
      continue;
    }
    const auto packed = packed_rows(inbox, e);
    for (std::size_t i = 0; i < arrivals.size(); ++i) {
      const std::size_t row = at(plan.offsets()[e]) + i;
      const RowRef& ref = inbox.refs()[row];
      fill_row(static_cast<std::uint64_t>(arrivals[i].token), options.dtype, options.hidden, wanted.data());
      const auto* got = static_cast<const std::byte*>(rows.base[ref.base]) + at(ref.row) * row_bytes;
      wrong += count_wrong(got, wanted.data(), options.dtype, options.hidden);
      wrong += inbox.weights()[row] != workload.weight(arrivals[i].token, arrivals[i].slot);
      if (inbox.layout() != Layout::indexed) {
        wrong +=
            count_wrong(inbox.packed().bytes() + packed[i] * row_bytes, wanted.data(), options.dtype, options.hidden);
      }
    }
  }
  return wrong;
}

}  // namespace expar::bench
