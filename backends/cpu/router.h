// The router's softmax and its K largest.
#pragma once

#include "backends/cpu/number.h"
#include "backends/cpu/work.h"

namespace expar::cpu::EXPAR_CPU_ISA {
namespace {

/// The largest scores, descending. A score goes behind those that are not smaller, so ties keep the order of indexes.
inline void take_largest(const float* scores, std::int64_t experts, std::int64_t topk, std::int32_t* ids, float* top) {
  std::int64_t found = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    if (found == topk && !(scores[e] > top[topk - 1])) continue;
    std::int64_t place = found < topk ? found++ : topk - 1;
    for (; place > 0 && scores[e] > top[place - 1]; --place) {
      top[place] = top[place - 1];
      ids[place] = ids[place - 1];
    }
    top[place] = scores[e];
    ids[place] = static_cast<std::int32_t>(e);
  }
}

inline void softmax_topk(const SoftmaxTopK& p, Pool& pool) {
  for_blocks(pool, p.tokens, p.experts * 32, [&](std::int64_t t, std::int64_t last) {
    for (; t < last; ++t) {
      const float* const logits = p.logits + t * p.experts;
      float* const scores = p.scores + t * p.experts;
      float largest = logits[0];
      for (std::int64_t e = 1; e < p.experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
#pragma GCC ivdep
      for (std::int64_t e = 0; e < p.experts; ++e) scores[e] = exp(logits[e] - largest);
      float sum = 0;
      for (std::int64_t e = 0; e < p.experts; ++e) sum += scores[e];
#pragma GCC ivdep
      for (std::int64_t e = 0; e < p.experts; ++e) scores[e] /= sum;
      p.logsumexp[t] = largest + log(sum);
      take_largest(scores, p.experts, p.topk, p.ids + t * p.topk, p.top + t * p.topk);
    }
  });
}

}  // namespace
}  // namespace expar::cpu::EXPAR_CPU_ISA
