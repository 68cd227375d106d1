// Where the tensors of a routing lie in its memory.
#include "src/route/layout.h"

namespace expar {
namespace {

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

}  // namespace

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

}  // namespace expar
