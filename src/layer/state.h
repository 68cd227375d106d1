// What a layer is made of, for its passes forwards and backwards.
#pragma once

#include <optional>

#include <expar/layer.h>

#include "src/layer/parameters.h"
#include "src/layer/router_part.h"
#include "src/layer/shared_part.h"
#include "src/layer/shared_ranks.h"
#include "src/layer/slices.h"
#include "src/layer/special_part.h"
#include "src/layer/workspaces.h"

namespace expar {

struct MoeLayer::State {
  /// Collective.
  State(const Context& context, const MoeLayerOptions& options);

  Context context;  // the one it was made with, for what is called without one
  MoeLayerOptions options;
  std::optional<SharedRanks> apart;  // where shared experts have ranks of their own
  RouterPart router;
  SharedPart shared;
  SpecialPart special;
  Slices slices;
  ExpertRange range;
  ExpertShape shape;  // of the experts that rows come to this rank for
  std::optional<LayerParameters> parameters;
  Workspaces workspaces;
  MoeRecord inference;
  PhaseTimes times;

  /// Shared experts, on this rank's own tokens.
  bool shares_here() const { return options.shared_inner > 0 && !apart; }
  bool holds_shared() const { return apart ? apart->hold_here() : options.shared_inner > 0; }
  /// What each rank computes for its own tokens while rows are on their way.
  bool has_own_part() const { return shares_here() || special; }
  /// Rows come here for the shared experts and for no others.
  bool serves_shared() const { return apart && apart->hold_here(); }

  /// The numbers that a pass shook the router's tokens by.
  std::optional<Jitter> jitter_of(const MoeRecord& record, ConstTensor mask) const;

  /// All throw Error: bad_argument.
  void check_context(const Context& c) const;
  void check_trains() const;
  void check_rows(const char* what, const ConstTensor& rows, std::int64_t tokens) const;

  void backward(const Context& c, MoeRecord& record, ConstTensor dout, Tensor dx);
};

}  // namespace expar
