// The making of a layer, and what its passes check.
#include "src/layer/state.h"

#include <string>

#include "src/layer/agree.h"
#include "src/util/check.h"

namespace expar {

MoeLayer::State::State(const Context& c, const MoeLayerOptions& o)
    : context(c),
      options(o),
      router(options),
      shared(options),
      special(options),
      slices(context, options),
      workspaces(options.workspace) {
  agree(context, options, [&] {
    if (options.shared_ranks > 0) apart.emplace(options, context.rank(), context.size());
    range = apart ? apart->routed() : experts_of(context.rank(), context.size(), options.routed_experts());
    parameters.emplace(options, range, slices.own(), holds_shared(), context.kernels());
  });
  shape = options.expert_shape();
  shape.inner = slices.own().count;
  if (!serves_shared()) return;
  shape = options.shared_shape();
  // Combine weighs the rows of all experts or of none.
  if (options.weights_on != WeightsOn::output) shape.weights_on = WeightsOn::inner;
}

std::optional<Jitter> MoeLayer::State::jitter_of(const MoeRecord& record, ConstTensor mask) const {
  if (options.router.jitter == 0.0F) return {};
  const MoeRecord::Kept& kept = *record.kept;
  return Jitter{Random(kept.seed, kept.stream), options.router.jitter, kept.first_token, mask};
}

void MoeLayer::State::check_context(const Context& c) const {
  if (c.size() == context.size() && c.rank() == context.rank()) return;
  refuse("the layer was made for rank " + std::to_string(context.rank()) + " of " + std::to_string(context.size()) +
         ", the context is rank " + std::to_string(c.rank()) + " of " + std::to_string(c.size()));
}

void MoeLayer::State::check_trains() const {
  if (options.inference) refuse("the layer is for inference alone (MoeLayerOptions::inference)");
}

void MoeLayer::State::check_rows(const char* what, const ConstTensor& rows, std::int64_t tokens) const {
  require(what, rows, options.dtype, {tokens, options.hidden});
}

}  // namespace expar
