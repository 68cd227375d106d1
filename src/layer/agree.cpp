// How the layer's errors reach every rank: at its making and between its operations.
#include "src/layer/agree.h"
#include "src/util/check.h"

#include <algorithm>
#include <bit>
#include <string>
#include <vector>

#include <expar/collectives.h>
#include <expar/operation.h>

namespace expar {
namespace {

void validate(const MoeLayerOptions& options) {
  validate(options.expert_shape());
  if (options.bound < 0) refuse("bound is " + std::to_string(options.bound) + ", below 0");
  if (options.shared_inner < 0) {
    refuse("shared_inner is " + std::to_string(options.shared_inner) + ", must be at least 0");
  }
  if (options.shared_ranks < 0) refuse("shared_ranks is " + std::to_string(options.shared_ranks) + ", below 0");
  if (options.shared_gate && options.shared_inner == 0) {
    refuse("shared_gate asks for shared experts, but shared_inner is 0");
  }
  if (options.lent && options.inference) {
    refuse("lent parameters are read as they lie and never packed: the layer cannot be for inference alone");
  }
  validate(options.router);
  const auto& [zero, copy, constant] = options.special;
  if (zero < 0 || copy < 0 || constant < 0 || options.routed_experts() < 1) {
    refuse(std::to_string(zero) + " zero, " + std::to_string(copy) + " copy and " + std::to_string(constant) +
           " constant experts of " + std::to_string(options.router.experts) +
           ": none may be below 0, and one expert must be left");
  }
  validate(options.capacity);
  if (options.router.choice == Choice::experts && options.capacity.policy != CapacityPolicy::none) {
    refuse("experts that choose their tokens take as many each: the layer must have no capacity");
  }
  if (options.capacity.policy == CapacityPolicy::overflow) {
    refuse("a layer computes in one pass: its capacity cannot have the policy overflow");
  }
}

struct Setting {
  const char* name;
  double value;
};

/// The options of a router, but E and K, which signatures show.
std::vector<Setting> settings_of(const RouterOptions& router) {
  return {{"score", static_cast<double>(router.score)},
          {"choice", static_cast<double>(router.choice)},
          {"renormalise", static_cast<double>(router.renormalise)},
          {"scaling", double{router.scaling}},
          {"groups", static_cast<double>(router.groups)},
          {"groups_used", static_cast<double>(router.groups_used)},
          {"vocabulary", static_cast<double>(router.vocabulary)},
          {"selection_bias", static_cast<double>(router.selection_bias)},
          {"router bias", static_cast<double>(router.bias)},
          {"jitter", double{router.jitter}},
          {"double_scores", static_cast<double>(router.double_scores)},
          {"balance", double{router.balance}},
          {"z", double{router.z}},
          {"sequence_balance", double{router.sequence_balance}},
          {"importance", double{router.importance}},
          {"importance_cv", double{router.importance_cv}},
          {"load", double{router.load}},
          {"load_deviation", double{router.load_deviation}},
          {"nan", static_cast<double>(router.nan)}};
}

}  // namespace

void alone(const Context& context, FunctionRef<void()> work) {
  try {
    work();
  } catch (...) {
    const Error error = current_error();
    context.communicator().fail(
        Error(error.code(), error.message(), {context.communicator().job_rank(context.rank()), -1, "layer"}));
  }
}

void agree_on_router(const Context& context, const RouterOptions& router, const std::string& operation) {
  const std::vector<Setting> settings = settings_of(router);
  const auto count = static_cast<std::int64_t>(settings.size());
  std::vector<std::int64_t> mine;
  for (const Setting& setting : settings) mine.push_back(std::bit_cast<std::int64_t>(setting.value));
  const Array all(DType::int64, {context.size(), count});
  all_gather(context, ConstTensor(mine.data(), {1, count}), all);
  for (int rank = 1; rank < context.size(); ++rank) {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t theirs = all.as<std::int64_t>()[rank * count + i];
      const std::int64_t first = all.as<std::int64_t>()[i];
      if (theirs == first) continue;
      const auto has = [&](int r, std::int64_t bits) {
        return "rank " + std::to_string(context.communicator().job_rank(r)) + " has " +
               settings[static_cast<std::size_t>(i)].name + " " + std::to_string(std::bit_cast<double>(bits));
      };
      context.communicator().throw_alike(Error(
          ErrorCode::mismatch, "routers disagree: " + has(0, first) + "; " + has(rank, theirs), {rank, 0, operation}));
    }
  }
}

void agree(const Context& context, const MoeLayerOptions& options, FunctionRef<void()> make) {
  Signature signature("layer");
  signature.with("hidden", options.hidden).with("inner", options.inner);
  signature.with("experts", options.router.experts).with("topk", options.router.topk);
  signature.with("activation", static_cast<std::int64_t>(options.activation)).with("bias", options.bias);
  signature.with_real("alpha", options.numbers.alpha).with_real("limit", options.numbers.limit);
  signature.with_real("offset", options.numbers.offset);
  signature.with("zero", options.special.zero).with("copy", options.special.copy);
  signature.with("constant", options.special.constant);
  signature.with("shared_inner", options.shared_inner).with("shared_gate", options.shared_gate);
  signature.with("shared_ranks", options.shared_ranks).with("slices", options.tensor ? options.tensor.size() : 1);
  signature.with("weights_on", static_cast<std::int64_t>(options.weights_on));
  signature.with("dtype", static_cast<std::int64_t>(options.dtype)).with("bound", options.bound);
  signature.with("payload", static_cast<std::int64_t>(options.payload.value_or(options.dtype)));
  signature.with("gradient_payload", static_cast<std::int64_t>(options.gradient_payload.value_or(options.dtype)));
  meet(context.communicator(), signature, [&] {
    validate(options);
    make();
    return Operation::Words{};
  });
  agree_on_router(context, options.router, "layer");
}

std::int64_t tokens_before(const Context& context, ConstTensor x, ConstTensor mask) {
  const auto shown = meet(context.communicator(), Signature("tokens_before"), [&]() -> Operation::Words {
    const std::int64_t all = x.size(0);
    const auto* valid = mask.absent() ? nullptr : mask.as<std::int8_t>();
    return {static_cast<std::uint64_t>(all - (mask.absent() ? 0 : std::count(valid, valid + all, std::int8_t{0})))};
  });
  std::int64_t before = 0;
  for (int rank = 0; rank < context.rank(); ++rank) {
    before += static_cast<std::int64_t>(shown[static_cast<std::size_t>(rank)][0]);
  }
  return before;
}

}  // namespace expar
