// Context: chooses kernels that all ranks have, and the rank's threads.
#include <expar/context.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <string>

#include <expar/operation.h>
#include <expar/registry.h>

#include "src/util/store_choice.h"

namespace expar {
namespace {

/// The best instruction set that every rank runs.
std::string agree_on_isa(const Communicator& communicator, const ContextOptions& options) {
  const std::string& backend = options.backend;
  const auto key = [](const std::string& isa) { return std::hash<std::string>{}(isa); };
  std::vector<std::string> mine;
  const auto shown = meet(communicator, Signature("context"), [&] {
    if (options.threads < 0) {
      throw Error(ErrorCode::bad_argument, "threads is " + std::to_string(options.threads) + ", below 0");
    }
    // EXPAR_ISA takes the better ones away: as if this processor did not have them.
    const std::string best = find_kernels(backend).isa;
    mine = available_isas(backend);
    mine.erase(mine.begin(), std::find(mine.begin(), mine.end(), best));
    Operation::Words words{};
    for (std::size_t i = 0; i < std::min(mine.size(), words.size()); ++i) words[i] = key(mine[i]);
    return words;
  });
  for (const std::string& isa : mine) {
    const auto has = [&](const Operation::Words& words) {
      return std::find(words.begin(), words.end(), key(isa)) != words.end();
    };
    if (std::all_of(shown.begin(), shown.end(), has)) return isa;
  }
  throw Error(ErrorCode::unsupported, "the ranks have no instruction set of backend \"" + backend + "\" in common");
}

}  // namespace

Context::Context(Communicator communicator, const ContextOptions& options) : communicator_(std::move(communicator)) {
  kernels_ = std::make_shared<const Kernels>(find_kernels(options.backend, agree_on_isa(communicator_, options)));
  pool_ =
      std::make_shared<Pool>(options.threads > 0 ? options.threads : std::max(1, available_cores().usable() / size()));
  stores_ = std::make_shared<StoreChoice>();
}

Context Context::on(const Communicator& group) const {
  if (!group) throw Error(ErrorCode::bad_argument, "rank " + std::to_string(rank()) + " is in no group here");
  Context context = *this;
  context.communicator_ = group.with_timeout(communicator_.timeout());
  return context;
}

Context Context::with_timeout(std::chrono::nanoseconds timeout) const {
  Context context = *this;
  context.communicator_ = communicator_.with_timeout(timeout);
  return context;
}

Context Context::declining(const Error& error) const {
  Context context = *this;
  context.communicator_ = communicator_.declining(error);
  return context;
}

Context Context::attempt(FunctionRef<void()> work) const {
  if (declines()) return *this;
  try {
    work();
  } catch (...) {
    return declining(current_error());
  }
  return *this;
}

}  // namespace expar
