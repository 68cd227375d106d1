// What a router does with logits: scores, choice, weights. Their gradient is in backward.cpp, the losses in losses.cpp.
#include <expar/router.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "src/route/check.h"
#include "src/route/global_choice.h"
#include "src/route/top_k.h"
#include "src/util/processor.h"
#include "src/util/ranges.h"

namespace expar {
namespace {

// ---- what is refused

void check_finite(const ConstTensor& logits, const ConstTensor& mask) {
  const std::int64_t experts = logits.size(1);
  const float* row = logits.as<float>();
  for (std::int64_t t = 0; t < logits.size(0); ++t, row += experts) {
    bool finite = true;
    for (std::int64_t e = 0; e < experts; ++e) {
      finite &= (std::bit_cast<std::uint32_t>(row[e]) & 0x7f800000u) != 0x7f800000u;
    }
    if (finite || is_padding(mask, t)) continue;
    for (std::int64_t e = 0; e < experts; ++e) {
      if (std::isfinite(row[e])) continue;
      refuse("logits[" + std::to_string(t) + "," + std::to_string(e) + "] is " +
             (std::isnan(row[e]) ? "nan"
              : row[e] > 0       ? "inf"
                                 : "-inf"));
    }
  }
}

void check_input(const char* what, const ConstTensor& tensor, bool wanted, const Shape& shape, DType dtype) {
  if (wanted && tensor.absent()) refuse(std::string("this router needs ") + what);
  if (!wanted && !tensor.absent()) refuse(std::string("this router has no use for ") + what);
  if (wanted) require(what, tensor, dtype, shape);
}

void check_token_table(const RouteInputs& inputs, const RouterOptions& options, std::int64_t tokens) {
  const bool wanted = options.choice == Choice::token_table && inputs.ids.absent();
  check_input("tokens", inputs.tokens, wanted, {tokens}, DType::int32);
  check_input("token_table", inputs.token_table, wanted, {options.vocabulary, options.topk}, DType::int32);
  if (!wanted) return;
  require_experts("token_table", inputs.token_table, options.experts, 0);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int32_t token = inputs.tokens.as<std::int32_t>()[t];
    if (is_padding(inputs.mask, t) || (token >= 0 && token < options.vocabulary)) continue;
    refuse("tokens[" + std::to_string(t) + "] = " + std::to_string(token) + " is not in the " +
           std::to_string(options.vocabulary) + " rows of token_table");
  }
}

void check_inputs(const RouteInputs& inputs, const RouterOptions& options, const ConstTensor& logits) {
  const std::int64_t tokens = logits.size(0);
  if (!inputs.mask.absent()) require("mask", inputs.mask, DType::int8, {tokens});
  check_input("selection_bias", inputs.selection_bias, options.selection_bias, {options.experts}, DType::f32);
  check_token_table(inputs, options, tokens);
  if (!inputs.ids.absent()) {
    require("ids", inputs.ids, DType::int32, {tokens, slots_of(options)});
    require_experts("ids", inputs.ids, options.experts);
  }
  if (options.nan == NanPolicy::error) check_finite(logits, inputs.mask);
}

// ---- where things lie

/// Cuts tensors out of the routing's memory, each on cache lines of its own.
class Cut {
 public:
  static constexpr std::int64_t kLine = 64;  // bytes
  static std::int64_t room(DType dtype, const Shape& shape) {
    return (shape.elements() * static_cast<std::int64_t>(size_of(dtype)) + kLine - 1) / kLine * kLine;
  }

  /// Without memory it only counts.
  explicit Cut(std::byte* memory) : memory_(memory) {}
  Tensor take(DType dtype, const Shape& shape) {
    const Tensor taken(memory_ == nullptr ? nullptr : memory_ + bytes_, dtype, shape);
    bytes_ += room(dtype, shape);
    return taken;
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  std::byte* memory_;
  std::int64_t bytes_ = 0;
};

/// Whether a choice compares something else than the scores.
bool compares_others(const RouterOptions& options) {
  return options.selection_bias || options.groups_used < options.groups || options.choice == Choice::logits ||
         options.choice == Choice::sinkhorn;
}

void lay_out(std::int64_t tokens, const RouterOptions& options, bool has_mask, Routing& routing) {
  const auto cut_out = [&](Cut cut) {
    const Shape all{tokens, options.experts};
    const Shape chosen{tokens, slots_of(options)};
    routing.ids = cut.take(DType::int32, chosen);
    routing.weights = cut.take(DType::f32, chosen);
    routing.top = cut.take(DType::f32, chosen);
    routing.scores = cut.take(DType::f32, all);
    routing.choice_scores = compares_others(options) ? cut.take(DType::f32, all) : routing.scores;
    routing.loss_scores = routing.probabilities = routing.scores;
    if (options.score != Score::softmax) {
      routing.loss_scores = cut.take(DType::f32, all);
      routing.probabilities = cut.take(DType::f32, all);
    }
    routing.logsumexp = cut.take(DType::f32, {tokens});
    routing.mask = has_mask ? cut.take(DType::int8, {tokens}) : Tensor();
    return cut.bytes();
  };
  const std::int64_t bytes = cut_out(Cut(nullptr));
  cut_out(Cut(routing.memory.view(DType::int8, {bytes}).bytes()));
}

// ---- one token after the other

double score_of(Score score, double z) {
  if (score == Score::sigmoid) return 1.0 / (1.0 + std::exp(-z));
  return std::sqrt(std::max(z, 0.0) + std::log1p(std::exp(-std::abs(z))));
}

struct Forward {
  const RouterOptions& options;
  const RouteInputs& inputs;
  const float* logits;
  const Routing& routing;
  bool chooses = false;                     // by itself: the ids are not there yet
  std::span<const double> logit_bias = {};  // [E] for the choice, or empty
  std::int64_t slots = slots_of(options);

  /// What one task needs beside its tokens' own rows.
  struct Scratch {
    double* scores;  // [E]
    double* values;  // [E] what is compared
    double* best;    // [E]
    double* groups;  // [G]
    std::int32_t* used_groups;

    static constexpr std::int64_t kRows = 5;
    Scratch(const Tensor& memory, std::int64_t task, std::int64_t experts) {
      std::byte* at = memory.rows(task, 1).bytes();
      const auto take = [&] { return std::exchange(at, at + experts * static_cast<std::int64_t>(sizeof(double))); };
      scores = reinterpret_cast<double*>(take());
      values = reinterpret_cast<double*>(take());
      best = reinterpret_cast<double*>(take());
      groups = reinterpret_cast<double*>(take());
      used_groups = reinterpret_cast<std::int32_t*>(take());
    }
  };

  void token(std::int64_t t, const Scratch& scratch) const;
  /// The same where the kernel has left scores, ids and top as they are wanted.
  void token_of_kernel(std::int64_t t) const {
    is_padding(inputs.mask, t) ? leave_out(t) : weigh(t, row(routing.top, t));
  }

 private:
  float* row(const Tensor& tensor, std::int64_t t) const { return tensor.as<float>() + t * tensor.size(1); }
  std::int32_t* ids(std::int64_t t) const { return routing.ids.as<std::int32_t>() + t * slots; }
  /// A result of + - * / of numbers that this has rounded is that of f32, or of double.
  double rounded(double value) const { return options.double_scores ? value : double{static_cast<float>(value)}; }

  void score_by_softmax(std::int64_t t, double* scores) const;
  void score_each(std::int64_t t, double* scores) const;
  void compare(std::int64_t t, const Scratch& scratch) const;
  void choose(std::int64_t t, const Scratch& scratch) const;
  template <class Use>
  void for_candidates(const Scratch& scratch, Use use) const;
  double worth_of_group(std::int64_t group, const Scratch& scratch) const;
  void leave_out(std::int64_t t) const;
  template <class Number>
  void weigh(std::int64_t t, const Number* top) const;
};

void Forward::token(std::int64_t t, const Scratch& scratch) const {
  if (is_padding(inputs.mask, t)) return leave_out(t);
  if (options.score == Score::softmax) {
    score_by_softmax(t, scratch.scores);
  } else {
    score_each(t, scratch.scores);
  }
  if (chooses || compares_others(options)) compare(t, scratch);
  if (chooses) choose(t, scratch);
  for (std::int64_t k = 0; k < slots; ++k) {
    const std::int32_t id = ids(t)[k];
    scratch.best[k] = id < 0 ? 0.0 : scratch.scores[id];
    row(routing.top, t)[k] = static_cast<float>(scratch.best[k]);
  }
  weigh(t, scratch.best);
}

void Forward::leave_out(std::int64_t t) const {
  std::fill_n(ids(t), slots, -1);
  std::fill_n(row(routing.weights, t), slots, 0.0F);
  std::fill_n(row(routing.top, t), slots, 0.0F);
  for (const Tensor* tensor : {&routing.scores, &routing.choice_scores, &routing.loss_scores, &routing.probabilities}) {
    std::fill_n(row(*tensor, t), options.experts, 0.0F);
  }
  routing.logsumexp.as<float>()[t] = 0.0F;
}

void Forward::score_by_softmax(std::int64_t t, double* scores) const {
  float* stored = row(routing.scores, t);
  if (!options.double_scores) {  // the kernel has been here
    std::copy_n(stored, options.experts, scores);
    return;
  }
  const float* z = logits + t * options.experts;
  double largest = z[0];
  for (std::int64_t e = 1; e < options.experts; ++e) largest = std::fmax(largest, double{z[e]});
  double sum = 0;
  for (std::int64_t e = 0; e < options.experts; ++e) sum += scores[e] = std::exp(double{z[e]} - largest);
  for (std::int64_t e = 0; e < options.experts; ++e) stored[e] = static_cast<float>(scores[e] /= sum);
  routing.logsumexp.as<float>()[t] = static_cast<float>(largest + std::log(sum));
}

void Forward::score_each(std::int64_t t, double* scores) const {
  const float* z = logits + t * options.experts;
  double sum = 0;
  for (std::int64_t e = 0; e < options.experts; ++e) {
    scores[e] = rounded(score_of(options.score, double{z[e]}));
    row(routing.scores, t)[e] = static_cast<float>(scores[e]);
    sum = rounded(sum + scores[e]);
  }
  sum = rounded(sum + double{kTiny});
  for (std::int64_t e = 0; e < options.experts; ++e) {
    row(routing.loss_scores, t)[e] = static_cast<float>(scores[e] / sum);
  }
}

double Forward::worth_of_group(std::int64_t group, const Scratch& scratch) const {
  const std::int64_t size = options.experts / options.groups;
  std::int32_t ids[2];
  double best[2] = {};
  TopK top(options.selection_bias ? std::min<std::int64_t>(2, size) : 1, ids, best);
  for (std::int64_t e = group * size; e < (group + 1) * size; ++e) {
    top.offer(static_cast<std::int32_t>(e), scratch.values[e]);
  }
  return rounded(best[0] + best[1]);
}

/// The experts of the token's groups, in ascending order.
template <class Use>
void Forward::for_candidates(const Scratch& scratch, Use use) const {
  const bool all = options.groups_used == options.groups;
  const std::int64_t size = all ? options.experts : options.experts / options.groups;
  for (std::int64_t i = 0; i < (all ? 1 : options.groups_used); ++i) {
    const std::int64_t first = all ? 0 : scratch.used_groups[i] * size;
    for (std::int64_t e = first; e < first + size; ++e) use(e);
  }
}

/// What is compared, and the groups in which.
void Forward::compare(std::int64_t t, const Scratch& scratch) const {
  const float* z = logits + t * options.experts;
  const float* bias = options.selection_bias ? inputs.selection_bias.as<float>() : nullptr;
  const bool by_logits = options.choice == Choice::logits || options.choice == Choice::sinkhorn;
  for (std::int64_t e = 0; e < options.experts; ++e) {
    double& value = scratch.values[e] = by_logits ? double{z[e]} : scratch.scores[e];
    if (!logit_bias.empty()) value += logit_bias[static_cast<std::size_t>(e)];
    if (bias != nullptr) value = rounded(value + double{bias[e]});
  }
  if (options.groups_used < options.groups) {
    TopK best_groups(options.groups_used, scratch.used_groups, scratch.groups);
    for (std::int64_t g = 0; g < options.groups; ++g) {
      best_groups.offer(static_cast<std::int32_t>(g), worth_of_group(g, scratch));
    }
    std::sort(scratch.used_groups, scratch.used_groups + options.groups_used);  // so that ties go to the lower expert
  }
  if (!compares_others(options)) return;
  float* kept = row(routing.choice_scores, t);
  std::fill_n(kept, options.experts, -std::numeric_limits<float>::infinity());
  for_candidates(scratch, [&](std::int64_t e) { kept[e] = static_cast<float>(scratch.values[e]); });
}

void Forward::choose(std::int64_t t, const Scratch& scratch) const {
  TopK top(options.topk, ids(t), scratch.best);
  for_candidates(scratch, [&](std::int64_t e) { top.offer(static_cast<std::int32_t>(e), scratch.values[e]); });
}

template <class Number>
void Forward::weigh(std::int64_t t, const Number* top) const {
  double sum = 1.0;
  if (options.renormalise) {
    sum = 0.0;
    for (std::int64_t k = 0; k < slots; ++k) sum = rounded(sum + double{top[k]});
    sum = rounded(sum + double{kTiny});
  }
  for (std::int64_t k = 0; k < slots; ++k) {
    row(routing.weights, t)[k] = static_cast<float>(rounded(double{top[k]} / sum) * double{options.scaling});
  }
}

// ---- all tokens

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
  if (inputs.failure) throw Error(*inputs.failure);
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
  const Forward forward{options, inputs, logits.as<float>(), routing, chooses, logit_bias};
  const std::int64_t tasks = by_kernel ? 0 : (tokens + kGrain - 1) / kGrain;
  const Tensor memory = routing.scratch.view(DType::int64, {tasks, Forward::Scratch::kRows * options.experts});
  for_ranges(context.pool(), tokens, kGrain, [&](std::int64_t begin, std::int64_t end) {
    if (by_kernel) {
      for (std::int64_t t = begin; t < end; ++t) forward.token_of_kernel(t);
      return;
    }
    const Forward::Scratch scratch(memory, begin / kGrain, options.experts);
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
