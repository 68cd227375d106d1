// The layer's parameters: drawing and writing them, copying them to bf16, packing them.
#include "src/layer/parameters.h"

#include <cstring>
#include <string>
#include <utility>

#include "src/layer/convert.h"
#include "src/layer/draw.h"
#include "src/util/check.h"
#include "src/util/ranges.h"

namespace expar {
namespace {

void zero(const Tensor& values) {
  for (std::int64_t i = 0; i < values.elements(); ++i) values.as<float>()[i] = 0.0F;
}

/// One group of a matrix or of a bias, without the axis of groups.
Tensor group_of(const Tensor& all, std::int64_t group) {
  const Tensor part = all.rows(group, 1);
  return all.shape().rank() == 3 ? Tensor(part.data(), all.dtype(), {all.size(1), all.size(2)})
                                 : Tensor(part.data(), all.dtype(), {all.size(1)});
}

void require(const char* what, const ConstTensor& from, const Shape& shape) {
  if (from.shape() == shape && (from.dtype() == DType::f32 || from.dtype() == DType::bf16)) return;
  throw Error(ErrorCode::bad_argument, std::string(what) + " to write is " + std::string(name(from.dtype())) + " " +
                                           from.shape().str() + ", should be f32 or bf16 " + shape.str());
}

void copy(const ConstTensor& from, const Tensor& to, Pool& pool) {
  if (from.dtype() != to.dtype()) return to_f32(from, to, pool);
  if (to.byte_size() > 0) std::memcpy(to.data(), from.data(), to.byte_size());
}

}  // namespace

LayerParameters::LayerParameters(const MoeLayerOptions& options, ExpertRange range, ExpertRange slice,
                                 bool holds_shared, const Kernels& kernels)
    : first_(range.first),
      dtype_(options.dtype),
      bias_(options.bias),
      inference_(options.inference),
      lends_(options.lent),
      has_down_bias_(slice.first == 0),
      kernels_(kernels) {
  const std::int64_t hidden = options.hidden, blocks = gated(options.activation) ? 2 : 1;
  const auto make = [&](Held& held, DType dtype, const Shape& of) {
    if (lends_) return held.lend(Tensor(nullptr, dtype, of));
    held = Held(Array(dtype, of));
  };
  const auto trained = [&](Trained& t, const Shape& of) {
    t.shape = of;
    make(t.value, DType::f32, of);
  };
  const auto matrix = [&](Matrix& m, std::int64_t groups, const MatrixPart& part) {
    m.part = part;
    m.shape = {groups, part.shape()[0], part.shape()[1]};
    if (inference_) return make_room(m, dtype_, kernels_);
    trained(m, m.shape);
    if (dtype_ == DType::bf16) make(m.low, DType::bf16, m.shape);
  };
  trained(router_, {options.router.experts, options.hidden});
  if (options.router.bias) trained(router_bias_, {options.router.experts});
  if (options.router.selection_bias) selection_bias_ = Array(DType::f32, {options.router.experts});
  if (options.router.choice == Choice::token_table) {
    token_table_ = Array(DType::int32, {options.router.vocabulary, options.router.topk});
  }
  if (const std::int64_t constant = options.special.constant; constant > 0) {
    trained(special_mix_, {constant, 2, options.hidden});
    trained(special_value_, {constant, options.hidden});
  }
  matrix(up_, range.count, {{blocks * options.inner, hidden}, blocks, slice, {0, hidden}});
  matrix(down_, range.count, {{hidden, options.inner}, 1, {0, hidden}, slice});
  if (bias_) {
    up_bias_part_ = {{blocks * options.inner, 1}, blocks, slice, {0, 1}};
    trained(up_bias_, {range.count, blocks * slice.count});
    trained(down_bias_, {range.count, hidden});
    // The zeros of a slice that adds none are nobody's parameter.
    if (!has_down_bias_) down_bias_.value = Held(Array(DType::f32, down_bias_.shape));
  }
  if (options.shared_inner > 0 && options.shared_gate) trained(shared_gate_, {options.hidden});
  if (!holds_shared) return;
  matrix(shared_up_, 1, MatrixPart::all(options.shared_shape().up_rows(), hidden));
  matrix(shared_down_, 1, MatrixPart::all(hidden, options.shared_inner));
}

void LayerParameters::initialise(std::uint64_t seed, std::string_view prefix, Pool& pool) {
  check_lent();
  const auto draw_all = [&](const Tensor& values, const char* what) {
    const std::int64_t rows = values.shape().rank() == 1 ? 1 : values.size(0);
    draw(MatrixPart::all(rows, values.elements() / rows), values, seed, join(prefix, what), pool);
  };
  draw_all(router_.value, "router.weight");
  for (std::int64_t e = 0; e < up_.shape[0]; ++e) {
    const std::string expert = join(prefix, "experts." + std::to_string(first_ + e));
    draw_group(up_, e, seed, expert + ".up", pool);
    draw_group(down_, e, seed, expert + ".down", pool);
  }
  if (bias_) {
    zero(up_bias_.value);
    zero(down_bias_.value);
  }
  if (special_mix_) draw_all(special_mix_.value, "special.mix");
  if (special_value_) draw_all(special_value_.value, "special.value");
  if (router_bias_) zero(router_bias_.value);
  if (selection_bias_) zero(selection_bias_);
  if (token_table_) draw_token_table(token_table_, router_.shape[0], seed, join(prefix, "router.token_table"));
  if (has_shared()) {
    draw_group(shared_up_, 0, seed, join(prefix, "shared.up"), pool);
    draw_group(shared_down_, 0, seed, join(prefix, "shared.down"), pool);
  }
  if (shared_gate_) draw_all(shared_gate_.value, "shared.gate");
  refresh(pool);
}

void LayerParameters::draw_group(Matrix& matrix, std::int64_t group, std::uint64_t seed, const std::string& stream,
                                 Pool& pool) {
  fill(matrix, group, pool, [&](const Tensor& values) { draw(matrix.part, values, seed, stream, pool); });
}

void LayerParameters::write(std::int64_t e, const ExpertSource& from, Pool& pool) {
  check_lent();
  const auto bias = [&](const Trained& b, const char* what, const MatrixPart& part, const ConstTensor& values) {
    require(what, values, {part.whole[0]});
    const Array taken(values.dtype(), {part.shape()[0]});
    take_part(part, values, taken);
    copy(taken, group_of(b.value, e), pool);
  };
  write(up_, "up", e, from.up, pool);
  write(down_, "down", e, from.down, pool);
  if (!bias_) return;
  bias(up_bias_, "up_bias", up_bias_part_, from.up_bias);
  if (has_down_bias_) bias(down_bias_, "down_bias", MatrixPart::all(down_.part.whole[0], 1), from.down_bias);
}

void LayerParameters::write_shared(ConstTensor up, ConstTensor down, ConstTensor gate, Pool& pool) {
  check_lent();
  if (has_shared()) {
    write(shared_up_, "shared.up", 0, up, pool);
    write(shared_down_, "shared.down", 0, down, pool);
  }
  if (!shared_gate_) return;
  require("shared.gate", gate, shared_gate_.shape);
  copy(gate, shared_gate_.value, pool);
}

void LayerParameters::write(Matrix& matrix, const char* what, std::int64_t group, const ConstTensor& from, Pool& pool) {
  require(what, from, matrix.part.whole);
  if (matrix.part.shape() != matrix.part.whole) {
    const Array taken(from.dtype(), matrix.part.shape());
    take_part(matrix.part, from, taken);
    return store(matrix, group, taken, pool);
  }
  store(matrix, group, from, pool);
}

/// What is here of one group.
void LayerParameters::store(Matrix& matrix, std::int64_t group, const ConstTensor& from, Pool& pool) {
  if (inference_ && from.dtype() == dtype_) return pack_group(matrix, group, from, pool);
  fill(matrix, group, pool, [&](const Tensor& to) { copy(from, to, pool); });
}

void LayerParameters::fill(Matrix& matrix, std::int64_t group, Pool& pool, FunctionRef<void(const Tensor&)> write) {
  if (matrix.value) return write(group_of(matrix.value, group));
  const Shape one{matrix.shape[1], matrix.shape[2]};
  const Array staged(DType::f32, one);
  write(staged);
  if (!inference_) return to_bf16(staged, group_of(matrix.low, group), pool);
  if (dtype_ == DType::f32) return pack_group(matrix, group, staged, pool);
  const Array low(DType::bf16, one);
  to_bf16(staged, low, pool);
  pack_group(matrix, group, low, pool);
}

void LayerParameters::pack_group(Matrix& matrix, std::int64_t group, const ConstTensor& values, Pool& pool) {
  const std::int64_t n = values.size(0), k = values.size(1);
  std::byte* const to = matrix.packed.view().bytes() + group * kernels_.packed_bytes(dtype_, n, k);
  kernels_.pack(dtype_, 1, n, k, values.data(), to, pool);
}

std::size_t LayerParameters::bytes() const {
  std::size_t sum = 0;
  const auto add = [&](const Array& array) { sum += array ? array.view().byte_size() : 0; };
  for (const Array* array : {&selection_bias_, &token_table_}) add(*array);
  for (const Trained* t :
       {&router_, &router_bias_, &up_bias_, &down_bias_, &shared_gate_, &special_mix_, &special_value_}) {
    sum += t->value.bytes() + t->gradient.bytes();
  }
  for (const Matrix* m : {&up_, &down_, &shared_up_, &shared_down_}) {
    sum += m->value.bytes() + m->gradient.bytes() + m->low.bytes();
    add(m->packed);
  }
  return sum;
}

void LayerParameters::refresh(Pool& pool) {
  if (inference_) return;
  check_lent();
  for (const Matrix* m : {&up_, &down_, &shared_up_, &shared_down_}) {
    if (m->low && m->value) to_bf16(m->value, m->low, pool);
  }
  packed_by_ = nullptr;
  watched_ = false;
}

ExpertWeights LayerParameters::biases() const {
  ExpertWeights weights;
  if (!bias_) return weights;
  weights.up_bias = up_bias_.value;
  weights.down_bias = down_bias_.value;
  return weights;
}

ExpertWeights LayerParameters::plain() const {
  ExpertWeights weights = biases();
  weights.up = {read(up_).data(), dtype_, false};
  weights.down = {read(down_).data(), dtype_, false};
  return weights;
}

ExpertWeights LayerParameters::for_inference(const Kernels& kernels, Pool& pool) {
  if (!packs(kernels, pool)) return plain();
  ExpertWeights weights = biases();
  weights.up = {up_.packed.view().data(), dtype_, true};
  weights.down = {down_.packed.view().data(), dtype_, true};
  return weights;
}

SharedWeights LayerParameters::shared() const {
  SharedWeights weights;
  if (shared_gate_) weights.gate = shared_gate_.value;
  if (!has_shared()) return weights;
  weights.expert.up = {read(shared_up_).data(), dtype_, false};
  weights.expert.down = {read(shared_down_).data(), dtype_, false};
  return weights;
}

SharedWeights LayerParameters::shared_for_inference(const Kernels& kernels, Pool& pool) {
  if (!has_shared() || !packs(kernels, pool)) return shared();
  SharedWeights weights;
  weights.expert.up = {shared_up_.packed.view().data(), dtype_, true};
  weights.expert.down = {shared_down_.packed.view().data(), dtype_, true};
  if (shared_gate_) weights.gate = shared_gate_.value;
  return weights;
}

/// Whether packed copies may be read; makes them where they are stale.
bool LayerParameters::packs(const Kernels& kernels, Pool& pool) {
  if (inference_) {
    if (kernels.pack == kernels_.pack) return true;
    throw Error(ErrorCode::bad_argument,
                std::string("the layer is for inference alone: its weights are packed for the kernels of ") +
                    kernels_.name + " (" + kernels_.isa + "), not of " + kernels.name + " (" + kernels.isa + ")");
  }
  if (lends_ || watched_) return false;
  if (packed_by_ == kernels.pack) return true;
  packed_by_ = nullptr;
  for (Matrix* m : {&up_, &down_, &shared_up_, &shared_down_}) {
    if (m->value) pack(*m, kernels, pool);
  }
  packed_by_ = kernels.pack;
  return true;
}

void LayerParameters::make_room(Matrix& matrix, DType dtype, const Kernels& kernels) {
  const Shape& shape = matrix.shape;
  const std::int64_t bytes = shape[0] * kernels.packed_bytes(dtype, shape[1], shape[2]);
  if (!matrix.packed || matrix.packed.view().elements() != bytes) matrix.packed = Array(DType::int8, {bytes});
}

void LayerParameters::pack(Matrix& matrix, const Kernels& kernels, Pool& pool) const {
  make_room(matrix, dtype_, kernels);
  const Tensor all = read(matrix);
  kernels.pack(dtype_, static_cast<int>(all.size(0)), all.size(1), all.size(2), all.data(), matrix.packed.view().data(),
               pool);
}

ExpertGradients LayerParameters::gradients() {
  // Inference never asks for them.
  for (Trained* t : {static_cast<Trained*>(&up_), static_cast<Trained*>(&down_), &up_bias_, &down_bias_}) {
    if (*t && !t->gradient) t->gradient = Held(Array(DType::f32, t->shape));
  }
  ExpertGradients gradients;
  gradients.up = up_.gradient;
  gradients.down = down_.gradient;
  if (bias_) {
    gradients.up_bias = up_bias_.gradient;
    gradients.down_bias = down_bias_.gradient;
  }
  return gradients;
}

}  // namespace expar
