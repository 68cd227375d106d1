// One layer with its parameters, one global batch, and what comes out of them on any number of ranks.
#pragma once

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include <expar/layer.h>

namespace expar::test {

struct LayerSpec {
  std::int64_t experts = 8, topk = 2;
  Activation activation = Activation::swiglu;
  ActivationNumbers numbers = {};
  bool bias = false;
  WeightsOn weights_on = WeightsOn::output;
  DType dtype = DType::f32;
  bool recompute = false;
  std::int64_t shared_inner = 0;
  bool shared_gate = false;
  bool renormalise = true;
  int hot = -1, cold = -1;               // an expert that every token chooses, and one that none does
  std::int64_t hidden = 35, inner = 19;  // no multiples of any vector
  std::int64_t bound = 0;
  std::optional<DType> payload = {}, gradient_payload = {};
  CapacityOptions capacity = {};
  SpecialExperts special = {};  // beside `experts`

  std::int64_t all_experts() const { return experts + special.count(); }
  std::string name() const;
};

inline void PrintTo(const LayerSpec& spec, std::ostream* out) { *out << spec.name(); }

/// Global arrays; each rank takes its part. Those of the layer's dtype hold numbers that it can represent.
struct LayerCase {
  explicit LayerCase(const LayerSpec& s);

  LayerSpec spec;
  std::vector<std::int64_t> shards{0, 3, 3, 11, 12, 20, 26, 31, 37};  // of the global batch; one is empty
  std::vector<float> x, residual, dout;                               // [T, H]
  std::vector<float> router, up, down, up_bias, down_bias;            // [E, ...]
  std::vector<float> shared_up, shared_down, shared_gate;
  std::vector<float> special_mix, special_value;

  std::int64_t tokens() const { return shards.back(); }
  std::int64_t wide() const { return gated(spec.activation) ? 2 * spec.inner : spec.inner; }
  MoeLayerOptions options() const;
  /// Which shards a rank holds: few on rank 0, the empty one on rank 1, the others split among the rest.
  struct Held {
    std::size_t first = 0, count = 0;
  };
  Held held(int rank, int ranks) const;
  /// Draws nothing: writes this rank's part of the parameters into a layer.
  void fill(MoeLayer& layer) const;
  /// The global array of a parameter that all ranks hold alike ("shared.up").
  const std::vector<float>& dense(const std::string& name) const;
  /// Where each element of an expert parameter of `layer` stands in the global array of that name ("up", "down_bias").
  std::vector<std::size_t> places(const MoeLayer& layer, const std::string& name) const;
};

/// What a layer gave, in global order, as f32; seen by all ranks, processes included.
class LayerResult {
 public:
  explicit LayerResult(const LayerCase& layer_case);
  ~LayerResult();
  LayerResult(LayerResult&& other) noexcept;
  LayerResult& operator=(LayerResult&&) = delete;

  struct Section {
    std::string name;
    std::size_t begin = 0, count = 0;
  };
  const std::vector<Section>& sections() const { return sections_; }
  float* at(const std::string& name) const;
  /// The first difference, bit by bit: "dx[17]: 0.5 and 0.25"; empty if there is none.
  std::string difference(const LayerResult& other) const;

 private:
  std::vector<Section> sections_;
  std::size_t total_ = 0;
  float* values_ = nullptr;
};

/// This rank's part of one training step (forward, backward) and one inference, into the global arrays. Ranks of
/// `tensor` hold slices of the same experts: all do the same, and the first writes.
void run_layer(const LayerCase& layer_case, const Context& context, const LayerResult& result,
               const Communicator& tensor = {});

/// The rank's rows of a global [T, H] as an array of dtype, and back.
Array rows_of(const LayerCase& layer_case, const std::vector<float>& all, LayerCase::Held held);
void to_f32(const ConstTensor& from, float* to);

}  // namespace expar::test
