// How the layer's errors reach every rank: at its making, before its operations and between them.
#include "src/layer/agree.h"

#include <bit>
#include <exception>
#include <new>
#include <string>

namespace expar {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::bad_argument, message); }

void validate(const MoeLayerOptions& options) {
  if (options.hidden < 1) refuse("hidden is " + std::to_string(options.hidden) + ", must be at least 1");
  if (options.inner < 1) refuse("inner is " + std::to_string(options.inner) + ", must be at least 1");
  if (options.dtype != DType::f32 && options.dtype != DType::bf16) {
    refuse("a layer computes in f32 or bf16, not " + std::string(name(options.dtype)));
  }
  validate(options.router);
}

/// What the ranks must agree on besides the numbers of the signature.
Operation::Words words_of(const RouterOptions& router) {
  return {std::bit_cast<std::uint32_t>(router.balance), std::bit_cast<std::uint32_t>(router.z), router.renormalise,
          static_cast<std::uint64_t>(router.nan)};
}

[[noreturn]] void disagree(const Operation& operation, int rank) {
  const auto text = [&](int r) {
    const Operation::Words& w = operation.words(r);
    const auto number = [&](std::size_t i) {
      return std::to_string(std::bit_cast<float>(static_cast<std::uint32_t>(w[i])));
    };
    return "rank " + std::to_string(r) + " has balance " + number(0) + ", z " + number(1) + ", renormalise " +
           (w[2] != 0 ? "on" : "off") + ", nan " + (w[3] != 0 ? "propagate" : "error");
  };
  throw Error(ErrorCode::mismatch, "routers disagree: " + text(0) + "; " + text(rank), {rank, 0, "layer"});
}

}  // namespace

std::optional<Error> attempt(FunctionRef<void()> work) {
  try {
    work();
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error(ErrorCode::no_memory, "no memory");
  } catch (const std::exception& error) {
    return Error(ErrorCode::internal, error.what());
  }
  return std::nullopt;
}

void alone(const Context& context, FunctionRef<void()> work) {
  const std::optional<Error> error = attempt(work);
  if (!error) return;
  context.communicator().fail(Error(error->code(), error->message(), {context.rank(), -1, "layer"}));
}

void agree(const Context& context, const MoeLayerOptions& options, FunctionRef<void()> make) {
  Signature signature("layer");
  signature.with("hidden", options.hidden).with("inner", options.inner);
  signature.with("experts", options.router.experts).with("topk", options.router.topk);
  signature.with("activation", static_cast<std::int64_t>(options.activation)).with("bias", options.bias);
  signature.with("dtype", static_cast<std::int64_t>(options.dtype));
  Operation operation(context.communicator(), signature, context.timeout());
  operation.ready([&] {
    validate(options);
    make();
    return words_of(options.router);
  });
  operation.meet();
  operation.done();
  operation.complete();
  for (int rank = 1; rank < context.size(); ++rank) {
    if (operation.words(rank) != operation.words(0)) disagree(operation, rank);
  }
}

}  // namespace expar
