// How the layer's errors reach every rank: at its making, before its operations and between them.
#pragma once

#include <optional>

#include <expar/layer.h>

namespace expar {

/// Runs what this rank does alone before the ranks meet, and returns its error for the operation in which they do.
std::optional<Error> attempt(FunctionRef<void()> work);

/// Runs what this rank does alone between two operations. An error there ends the job: the others are on their way.
void alone(const Context& context, FunctionRef<void()> work);

/// Throws the same error on every rank unless all make the same layer, and can. `make` is this rank's part.
/// Collective.
void agree(const Context& context, const MoeLayerOptions& options, FunctionRef<void()> make);

/// How many tokens the ranks before this one have; throws the same error on every rank where one has a failure.
/// Collective.
std::int64_t tokens_before(const Context& context, std::int64_t tokens, const std::optional<Error>& failure);

}  // namespace expar
