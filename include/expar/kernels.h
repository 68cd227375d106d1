// What a backend computes: one table of kernels, the seam between the library and a processor.
//
// Shapes use the letters of the design: R rows, G groups (local experts), N outputs, K inner length.
// Every kernel keeps two promises, which the tests of every backend check:
//   - an element's value depends on its own inputs alone, never on the number of rows beside it, on tiles or on
//   threads;
//   - sums run over the inner dimension in index order, in f32, as one chain per element.
// Kernels trust their arguments; the public door has checked them. They do not allocate once warm.
#pragma once

#include <cstdint>
#include <limits>
#include <string_view>

#include <expar/pool.h>
#include <expar/tensor.h>

namespace expar {

/// One row of a grouped GEMM: row `row` of operand `base`.
struct RowRef {
  std::int32_t base = 0;  // 0: the rank's own x, 1: the inbox
  std::int32_t row = 0;
};

/// R rows of `width` elements, gathered by `refs`; without refs, row i is row i of base[0].
struct Rows {
  const void* base[2] = {nullptr, nullptr};
  DType dtype = DType::f32;
  std::int64_t width = 0;
  const RowRef* refs = nullptr;  // [R] or null
};

/// Rows [offsets[g], offsets[g + 1]) belong to group g.
struct Groups {
  int count = 0;
  const std::int64_t* offsets = nullptr;  // [G + 1], offsets[0] = 0
};

/// Weights [G, N, K], row-major or in the backend's packed layout (see Kernels::pack).
struct GroupWeights {
  const void* data = nullptr;
  DType dtype = DType::f32;
  bool packed = false;
};

/// y[i, n] = sum_k rows[i, k] * w[g(i)][n, k] + bias_weights[i] * bias[g(i)][n]
struct GemmNT {
  Groups groups;
  std::int64_t n = 0, k = 0;
  Rows rows;  // [R, K], dtype of w
  GroupWeights w;
  const float* bias = nullptr;          // [G, N] or null
  const float* bias_weights = nullptr;  // [R], or null: all are 1
  void* y = nullptr;                    // [R, N]
  DType y_dtype = DType::f32;           // f32 or the dtype of w
};

/// dx[i, k] = sum_n dy[i, n] * w[g(i)][n, k]
struct GemmNN {
  Groups groups;
  std::int64_t n = 0, k = 0;
  const void* dy = nullptr;  // [R, N], dtype of w
  GroupWeights w;            // never packed
  void* dx = nullptr;        // [R, K]
  DType dx_dtype = DType::f32;
};

/// dw[g][n, k] = sum over the group's rows i, in order, of dy[i, n] * rows[i, k]
/// dbias[g][n] the same with rows[i, k] = 1. A group without rows gets zeros.
struct GemmTN {
  Groups groups;
  std::int64_t n = 0, k = 0;
  const void* dy = nullptr;  // [R, N], dtype of rows
  Rows rows;                 // [R, K]
  float* dw = nullptr;       // [G, N, K]
  float* dbias = nullptr;    // [G, N] or null
};

/// The experts' activation. Gated ones read [R, 2F] (gate g, then up u), plain ones [R, F].
///   swiglu  g sigmoid(alpha g) (u + offset)      silu   x sigmoid(alpha x)
///   geglu   g normal_integral(g) (u + offset)    gelu   x normal_integral(x): the exact one (erf)
///                                                relu2  max(x, 0)^2
enum class Activation : std::uint8_t { swiglu, gelu, geglu, silu, relu2 };
constexpr bool gated(Activation a) { return a == Activation::swiglu || a == Activation::geglu; }

/// The numbers in an activation's formula. Beyond a clamp the gradient is zero, at the limit it is not.
struct ActivationNumbers {
  float alpha = 1;                                       // of sigmoids
  float limit = std::numeric_limits<float>::infinity();  // gated: g = min(g, limit), u = clamp(u, -limit, limit) first
  float offset = 0;                                      // gated: added to u
  friend bool operator==(const ActivationNumbers&, const ActivationNumbers&) = default;
};

/// Activations as they are called where models are described.
struct NamedActivation {
  std::string_view name;
  Activation activation;
  ActivationNumbers numbers = {};
};
inline constexpr NamedActivation kActivations[] = {
    {"swiglu", Activation::swiglu},
    {"clamped_swiglu", Activation::swiglu, {.alpha = 1.702F, .limit = 7, .offset = 1}},  // GPT-OSS
    {"quick_geglu", Activation::swiglu, {.alpha = 1.702F}},  // the sigmoid that stands in for GELU
    {"geglu", Activation::geglu},
    {"gelu", Activation::gelu},
    {"silu", Activation::silu},
    {"relu2", Activation::relu2},
};

/// h = act(pre), computed in f32, rounded once.
struct Activate {
  Activation act = Activation::swiglu;
  ActivationNumbers numbers = {};
  std::int64_t rows = 0, inner = 0;  // R, F
  DType dtype = DType::f32;
  const void* pre = nullptr;  // [R, 2F] or [R, F]
  void* h = nullptr;          // [R, F]
};

/// dpre = dh * d act(pre) / d pre, computed in f32, rounded once.
struct ActivateGrad {
  Activation act = Activation::swiglu;
  ActivationNumbers numbers = {};
  std::int64_t rows = 0, inner = 0;
  DType dtype = DType::f32;
  const void* pre = nullptr;
  const void* dh = nullptr;  // [R, F]
  void* dpre = nullptr;      // shape of pre
};

/// out[i] = rows[i], or with weights rows[i] * weights[i] in f32, rounded once, where given. `dot`, where given, gets
/// the f32 inner product rows[i] . other[i], summed in index order, of the row without its weight.
struct Gather {
  Rows rows;
  std::int64_t count = 0;
  const float* weights = nullptr;  // [count] or null
  void* out = nullptr;             // [count, width], dtype of rows; or null
  const void* other = nullptr;     // [count, width], dtype of rows; or null
  float* dot = nullptr;            // [count]; with `other`
};

/// RMSNorm of a row x: scale = 1 / sqrt(mean(x^2) + epsilon), y = (x * scale) * gain, in f32, each product of y rounded
/// to its dtype. The squares are summed in eight chains, element j in chain j % 8, which are then added in pairs.
struct NormOutput {
  const float* gain = nullptr;  // [width]; null: there is no norm
  float epsilon = 0;
  void* y = nullptr;       // [T, width], dtype of the rows, which it may be
  float* scale = nullptr;  // [T] or null
};

/// The norm of each row.
struct RmsNormRows {
  std::int64_t tokens = 0, width = 0;
  DType dtype = DType::f32;
  const void* x = nullptr;  // [T, width]
  NormOutput norm;
};

/// out[t] = sum_k weight[t, k] * slot[t, k] + shared_weight[t] * shared[t] + residual[t], in this order, in f32,
/// rounded once. A null slot is skipped. Without weights every weight is one. Then the norm of out[t], if asked for.
struct Reduce {
  std::int64_t tokens = 0, topk = 0, width = 0;
  DType dtype = DType::f32;
  const void* const* slots = nullptr;     // [T, K] rows of `width` elements, or null
  const float* weights = nullptr;         // [T, K] or null
  const float* shared = nullptr;          // [T, width] or null
  const float* shared_weights = nullptr;  // [T] or null
  const void* residual = nullptr;         // [T, width] or null
  void* out = nullptr;                    // [T, width]; may be the residual, and a row of it one of its own slots
  NormOutput norm = {};
};

/// scores = softmax(logits) over E; then the K largest, descending, ties to the lower index.
struct SoftmaxTopK {
  std::int64_t tokens = 0, experts = 0, topk = 0;
  const float* logits = nullptr;  // [T, E]
  float* scores = nullptr;        // [T, E]
  float* logsumexp = nullptr;     // [T]
  std::int32_t* ids = nullptr;    // [T, K]
  float* top = nullptr;           // [T, K] scores of the chosen
};

/// AdamW (Loshchilov & Hutter 2019) on flat arrays, elementwise, f32:
///   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
///   p = p - lr (m / c1 / (sqrt(v / c2) + eps) + decay p),  c1 = 1 - b1^step, c2 = 1 - b2^step
/// `low`, where given, gets p rounded to bf16 in the same pass.
struct AdamWStep {
  std::int64_t count = 0;
  float lr = 0, beta1 = 0, beta2 = 0, eps = 0, decay = 0, c1 = 1, c2 = 1;
  const float* g = nullptr;
  float* p = nullptr;
  float* m = nullptr;
  float* v = nullptr;
  bf16* low = nullptr;  // or null
};

/// A payload is how rows travel, where not as they are: each value rounded to nearest even, beyond the largest
/// infinity, NaN kept. Or scaled by groups: scale = max|x| / limit, q = x * limit / max|x|, rounded to nearest even,
/// and back q * scale. Where one value is NaN or infinite, its scale and all that share it are NaN. Where the scale
/// would be below 2^-126, all that share it are zero. Source: the "dynamic" quantisation of npu_moe_distribute_dispatch
/// (mode 2, int8) and of DeepEP (fp8).
struct Payload {
  DType dtype;
  float limit = 0;         // the largest scaled value; 0: there are no scales
  std::int64_t group = 0;  // values of a row that share a scale; 0: all of them
};
/// All there are. A new one is a row here, an element of tensor.h and its conversion in each backend.
inline constexpr Payload kPayloads[] = {
    {DType::bf16},
    {DType::f16},
    {DType::int8, 127},
    {DType::fp8_e4m3, 448, 128},
};
/// Null where rows do not travel so. The others trust that they do.
const Payload* find_payload(DType dtype);
/// Values that share a scale, and scales of a row.
std::int64_t scale_group(DType payload, std::int64_t width);
std::int64_t scales_of(DType payload, std::int64_t width);
/// Bytes of one row: its scales in f32, its values, and up to three more, for the next row's scales to be aligned.
std::int64_t payload_bytes(DType payload, std::int64_t width);

/// out[i] = rows[index[i]] as it travels.
struct Quantise {
  DType payload = DType::int8;  // one of kPayloads
  DType dtype = DType::f32;     // of rows
  std::int64_t count = 0, width = 0;
  const void* rows = nullptr;           // [..., width]
  const std::int32_t* index = nullptr;  // [count], or null: row i is row i
  void* out = nullptr;                  // [count] of payload_bytes
};

/// out[i] = rows[i] as it was, but for the rounding; computed in f32, rounded once.
struct Dequantise {
  DType payload = DType::int8;
  DType dtype = DType::f32;  // of out
  std::int64_t count = 0, width = 0;
  const void* rows = nullptr;  // [count] of payload_bytes
  void* out = nullptr;         // [count, width]
};

/// A backend. A null entry falls back to `reference`; see registry.h for how a table is chosen.
struct Kernels {
  const char* name = "";  // "reference", "cpu"
  const char* isa = "";   // "portable", "avx2", "avx512", "avx512_bf16": ranks agree on one before they start
  void (*gemm_nt)(const GemmNT&, Pool&) = nullptr;
  void (*gemm_nn)(const GemmNN&, Pool&) = nullptr;
  void (*gemm_tn)(const GemmTN&, Pool&) = nullptr;
  void (*activate)(const Activate&, Pool&) = nullptr;
  void (*activate_grad)(const ActivateGrad&, Pool&) = nullptr;
  void (*gather)(const Gather&, Pool&) = nullptr;
  void (*reduce)(const Reduce&, Pool&) = nullptr;
  void (*rms_norm)(const RmsNormRows&, Pool&) = nullptr;
  void (*softmax_topk)(const SoftmaxTopK&, Pool&) = nullptr;
  void (*adamw)(const AdamWStep&, Pool&) = nullptr;
  void (*quantise)(const Quantise&, Pool&) = nullptr;
  void (*dequantise)(const Dequantise&, Pool&) = nullptr;
  /// Bytes of one group's packed [N, K] weights, and the packing of G groups; for inference, where weights never
  /// change.
  std::int64_t (*packed_bytes)(DType, std::int64_t n, std::int64_t k) = nullptr;
  void (*pack)(DType, int groups, std::int64_t n, std::int64_t k, const void* w, void* packed, Pool&) = nullptr;
};

}  // namespace expar
