// The arrays that a layer trains, their low-precision and packed copies, and which of these are fresh.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <expar/layer.h>

#include "src/layer/held.h"
#include "src/layer/part.h"
#include "src/layer/shared_expert.h"

namespace expar {

/// "prefix.name", or the name alone.
std::string join(std::string_view prefix, const std::string& name);

class LayerParameters {
 public:
  /// Of the experts in `range` the `slice` of their inner dimension. `kernels` pack what is for inference alone.
  LayerParameters(const MoeLayerOptions& options, ExpertRange range, ExpertRange slice, bool holds_shared,
                  const Kernels& kernels);

  void initialise(std::uint64_t seed, std::string_view prefix, Pool& pool);
  /// Of local expert `e`, and of the shared ones.
  void write(std::int64_t e, const ExpertSource& from, Pool& pool);
  void write_shared(ConstTensor up, ConstTensor down, ConstTensor gate, Pool& pool);
  void refresh(Pool& pool);
  std::size_t bytes() const;
  /// See MoeLayer.
  void lend(std::span<const Parameter> parameters);
  /// Throws Error: bad_argument (parameters that nobody has lent yet).
  void check_lent() const;

  bool has_shared() const { return static_cast<bool>(shared_up_); }
  ConstTensor router() const { return router_.value; }
  /// [E], or absent.
  Tensor router_bias() const { return router_bias_.value; }
  Tensor selection_bias() const { return selection_bias_; }
  /// [V, K] int32, or absent.
  Tensor token_table() const { return token_table_; }
  /// Of the constant experts, or absent.
  ConstTensor special_mix() const { return special_mix_.value; }
  ConstTensor special_value() const { return special_value_.value; }
  SharedWeights shared() const;
  SharedWeights shared_for_inference(const Kernels& kernels, Pool& pool);
  /// The weights as they are now.
  ExpertWeights plain() const;
  /// The same in the backend's layout, packed anew when they may have changed; plain where they may change unseen.
  ExpertWeights for_inference(const Kernels& kernels, Pool& pool);
  ExpertGradients gradients();

  /// See MoeLayer.
  std::vector<Parameter> experts(std::string_view prefix);
  std::vector<Parameter> dense(std::string_view prefix);
  /// A step of the optimizer is to be expected: packed copies are out of use until the next refresh().
  void expect_step() { watched_ = true; }

 private:
  struct Trained {
    Shape shape;  // of rank 0: there is none
    Held value, gradient;

    explicit operator bool() const { return shape.rank() > 0; }
  };
  struct Matrix : Trained {  // [groups, N, K]
    MatrixPart part;         // what is here of each group's matrix
    Held low;                // bf16 copy where the layer's dtype is bf16
    Array packed;  // in the layout of packed_by_; where the layer is for inference alone there is nothing else
  };

  void write(Matrix& matrix, const char* what, std::int64_t group, const ConstTensor& from, Pool& pool);
  void store(Matrix& matrix, std::int64_t group, const ConstTensor& from, Pool& pool);
  /// Lets `write` fill one group, [N, K] f32.
  void fill(Matrix& matrix, std::int64_t group, Pool& pool, FunctionRef<void(const Tensor&)> write);
  void pack_group(Matrix& matrix, std::int64_t group, const ConstTensor& values, Pool& pool);
  void draw_group(Matrix& matrix, std::int64_t group, std::uint64_t seed, const std::string& stream, Pool& pool);
  ExpertWeights biases() const;
  bool packs(const Kernels& kernels, Pool& pool);
  Tensor read(const Matrix& matrix) const { return matrix.low ? matrix.low : matrix.value; }
  static void make_room(Matrix& matrix, DType dtype, const Kernels& kernels);
  void pack(Matrix& matrix, const Kernels& kernels, Pool& pool) const;
  enum class Kind : std::uint8_t {
    weight,
    bias,
    one_group
  };  // biases do not decay; the axis of one group is not shown
  struct Entry {
    const char* name;
    Trained* trained;
    Held* low = nullptr;
    Kind kind = Kind::weight;

    /// Whether the layer has such a parameter, and how its caller sees it.
    explicit operator bool() const { return trained != nullptr && *trained; }
    Shape shape() const;
  };
  static constexpr std::size_t kEntries = 11, kExpertEntries = 4;
  std::array<Entry, kEntries> entries();
  void check_lent(const Entry& entry, const Parameter& lent) const;
  void lend(const Entry& entry, const Parameter& lent);
  std::vector<Parameter> list(std::string_view prefix, std::span<const Entry> entries);

  std::int64_t first_;  // global number of the first expert
  DType dtype_;
  bool bias_, inference_;
  bool lends_;          // parameters are the caller's
  bool lent_ = false;   // and have been handed in
  bool has_down_bias_;  // of the slices of an expert one adds it, the first
  MatrixPart up_bias_part_;
  Kernels kernels_;  // of the layer's own context
  Trained router_, router_bias_, up_bias_, down_bias_, shared_gate_, special_mix_, special_value_;
  Array selection_bias_, token_table_;
  Matrix up_, down_, shared_up_, shared_down_;   // those of shared experts are of one group
  decltype(Kernels::pack) packed_by_ = nullptr;  // null: the packed copies are stale or absent
  bool watched_ = false;                         // somebody may write the weights without telling
};

}  // namespace expar
