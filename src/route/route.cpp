// What a router does with a batch's logits. The gradient is in backward.cpp, the losses in losses.cpp.
#include <expar/router.h>

#include <algorithm>
#include <span>
#include <vector>

#include "src/route/check.h"
#include "src/route/global_choice.h"
#include "src/route/inputs.h"
#include "src/route/layout.h"
#include "src/route/token.h"
#include "src/util/ranges.h"

namespace expar {
namespace {

/// The ids that need no scores.
void place(const RouterOptions& options, const RouteInputs& inputs, const Routing& routing) {
  std::int32_t* ids = routing.ids.as<std::int32_t>();
  if (!inputs.ids.absent()) {
    std::copy_n(inputs.ids.as<std::int32_t>(), routing.ids.elements(), ids);
    return;
  }
  std::int64_t number = inputs.first_token;
  for (std::int64_t t = 0; t < routing.ids.size(0); ++t, ids += options.topk) {
    if (is_padding(inputs.mask, t)) continue;
    if (options.choice == Choice::token_table) {
      std::copy_n(inputs.token_table.rows(inputs.tokens.as<std::int32_t>()[t], 1).as<std::int32_t>(), options.topk,
                  ids);
    } else {
      for (std::int64_t k = 0; k < options.topk; ++k) {
        ids[k] = static_cast<std::int32_t>((number * options.topk + k) % options.experts);
      }
    }
    ++number;
  }
}

/// Softmax of the logits and its K largest.
void run_kernel(const Context& context, const RouterOptions& options, const ConstTensor& logits,
                const Routing& routing) {
  SoftmaxTopK call;
  call.tokens = logits.size(0);
  call.experts = options.experts;
  call.topk = options.topk;
  call.logits = logits.as<float>();
  call.scores = routing.probabilities.as<float>();
  call.logsumexp = routing.logsumexp.as<float>();
  call.ids = routing.ids.as<std::int32_t>();
  call.top = routing.top.as<float>();
  context.kernels().softmax_topk(call, context.pool());
}

/// What a call is about, and the parts of it that need no other rank.
struct Work {
  const Context& context;
  const RouterOptions& options;
  ConstTensor logits;
  const RouteInputs& inputs;
  Routing& routing;

  void prepare() const;
  void score_and_weigh(bool chooses, std::span<const double> logit_bias = {}) const;
};

/// Checks, lays out, and leaves the softmax.
void Work::prepare() const {
  validate(options);
  const std::int64_t tokens = logits.shape().rank() == 2 ? logits.size(0) : 0;
  require("logits", logits, DType::f32, {tokens, options.experts});
  check_inputs(inputs, options, logits);
  lay_out(tokens, options, !inputs.mask.absent(), routing);
  routing.valid = tokens;
  if (!inputs.mask.absent()) {
    const std::int8_t* mask = inputs.mask.as<std::int8_t>();
    std::copy_n(mask, tokens, routing.mask.as<std::int8_t>());
    routing.valid -= std::count(mask, mask + tokens, std::int8_t{0});
  }
  if (tokens > 0) run_kernel(context, options, logits, routing);
}

void Work::score_and_weigh(bool chooses, std::span<const double> logit_bias) const {
  const std::int64_t tokens = logits.size(0);
  const bool by_kernel = chooses && options.score == Score::softmax && !options.double_scores &&
                         options.choice == Choice::scores && !options.selection_bias &&
                         options.groups_used == options.groups;
  const TokenForward forward{options, inputs, logits.as<float>(), routing, chooses, logit_bias};
  const std::int64_t tasks = by_kernel ? 0 : (tokens + kGrain - 1) / kGrain;
  const Tensor memory = routing.scratch.view(DType::int64, {tasks, TokenForward::Scratch::kRows * options.experts});
  for_ranges(context.pool(), tokens, kGrain, [&](std::int64_t begin, std::int64_t end) {
    if (by_kernel) {
      for (std::int64_t t = begin; t < end; ++t) forward.token_of_kernel(t);
      return;
    }
    const TokenForward::Scratch scratch(memory, begin / kGrain, options.experts);
    for (std::int64_t t = begin; t < end; ++t) forward.token(t, scratch);
  });
}

/// The whole batch says what each expert's logits lack; then each token chooses for itself.
void route_by_sinkhorn(const Work& work) {
  const BatchRows logits = gather_rows(work.context, work.options, work.routing, [&] {
    work.prepare();
    return work.logits;
  });
  const std::vector<double> bias = sinkhorn_bias(work.context, logits.all);
  work.score_and_weigh(true, bias);
}

/// Scores first, while nobody is chosen; weights when all have chosen.
void route_by_experts(const Work& work) {
  const Tensor& ids = work.routing.ids;
  const BatchRows scores = gather_rows(work.context, work.options, work.routing, [&]() -> ConstTensor {
    work.prepare();
    std::fill_n(ids.as<std::int32_t>(), ids.elements(), -1);
    work.score_and_weigh(false);
    return work.routing.scores;
  });
  let_experts_choose(work.context, work.options, scores, work.routing);
  work.score_and_weigh(false);
}

}  // namespace

void route(const Context& context, const RouterOptions& options, ConstTensor logits, Routing& routing,
           const RouteInputs& inputs) {
  const Work work{context, options, logits, inputs, routing};
  const bool free = inputs.ids.absent();
  if (free && options.choice == Choice::sinkhorn) return route_by_sinkhorn(work);
  if (free && options.choice == Choice::experts) return route_by_experts(work);
  work.prepare();
  const bool chooses = free && (options.choice == Choice::scores || options.choice == Choice::logits);
  if (!chooses) place(options, inputs, routing);
  work.score_and_weigh(chooses);
}

}  // namespace expar
