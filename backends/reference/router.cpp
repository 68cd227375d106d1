// Softmax over the experts, then the largest scores.
#include <cmath>

#include "backends/reference/kernels.h"
#include "src/util/processor.h"

namespace expar::reference {

void softmax_topk(const SoftmaxTopK& p, Pool& pool) {
  pool.run(p.tokens, [&](std::int64_t t, int) {
    const FloatMode mode;
    const float* logits = p.logits + t * p.experts;
    float* scores = p.scores + t * p.experts;
    std::int32_t* ids = p.ids + t * p.topk;
    float* top = p.top + t * p.topk;

    float largest = logits[0];
    for (std::int64_t e = 1; e < p.experts; ++e) largest = std::fmax(largest, logits[e]);
    float sum = 0;
    for (std::int64_t e = 0; e < p.experts; ++e) sum += std::exp(logits[e] - largest);
    for (std::int64_t e = 0; e < p.experts; ++e) scores[e] = std::exp(logits[e] - largest) / sum;
    p.logsumexp[t] = largest + std::log(sum);

    // Insert each score behind those that are not smaller: ties keep the order of their indexes.
    std::int64_t found = 0;
    for (std::int32_t e = 0; e < p.experts; ++e) {
      std::int64_t place = found;
      while (place > 0 && scores[e] > top[place - 1]) --place;
      if (place == p.topk) continue;
      if (found < p.topk) ++found;
      for (std::int64_t k = found - 1; k > place; --k) {
        top[k] = top[k - 1];
        ids[k] = ids[k - 1];
      }
      top[place] = scores[e];
      ids[place] = e;
    }
  });
}

}  // namespace expar::reference
