// How the layer's errors reach every rank: at its making and between its operations.
#pragma once

#include <string>

#include <expar/layer.h>

namespace expar {

/// Runs what this rank does alone between two operations. An error there ends the job: the others are on their way.
void alone(const Context& context, FunctionRef<void()> work);

/// Throws mismatch on every rank, naming the option and two ranks, unless the ranks' routers have the same options;
/// their E and K are the same already. Collective.
void agree_on_router(const Context& context, const RouterOptions& router, const std::string& operation);

/// Throws the same error on every rank unless all make the same layer, and can. `make` is this rank's part.
/// Collective.
void agree(const Context& context, const MoeLayerOptions& options, FunctionRef<void()> make);

/// How many tokens that are no padding the ranks before this one have. Collective.
///   mask : [T] int8 or absent; 0 is padding
std::int64_t tokens_before(const Context& context, ConstTensor x, ConstTensor mask);

}  // namespace expar
