// AdamW on named parameters; low-precision copies are refreshed in the same pass, so that none is ever stale.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <expar/context.h>

namespace expar {

/// A trained array. All views have the same number of elements.
struct Parameter {
  std::string name;  // global: "layers.0.experts.up"
  Tensor value;      // f32, the master copy
  Tensor gradient;   // f32
  Tensor low;        // bf16 copy of value that the kernels read; absent: they read value
  bool decay = true;
};

struct AdamWOptions {
  float beta1 = 0.9F;
  float beta2 = 0.95F;
  float eps = 1e-8F;
  float decay = 0.0F;
};

/// What AdamW remembers of a parameter: running means of its gradient and of its square, [elements] f32 each.
struct AdamWMoments {
  Tensor m, v;
};

/// Elementwise, so the same bits however parameters are sharded.
/// Source: decoupled weight decay, Loshchilov & Hutter 2019.
class AdamW {
 public:
  explicit AdamW(const AdamWOptions& options = {}) : options_(options) {}

  /// One step over `parameters`: the same ones, in the same order, every time. Not collective.
  ///   lr : the learning rate of this step
  /// Throws Error: bad_argument (lr is negative or no number; the parameters changed; views of one disagree in size or
  /// dtype), no_memory (the first step makes the moments). Cost: reads p, m, v, g and writes p, m, v once.
  void step(const Context& context, std::span<const Parameter> parameters, float lr);

  /// How many steps were taken, and the moments of `parameters`, zero before the first: what to save. To go on from
  /// there, fill the moments and say how many steps they have seen. moments() throws as step().
  std::int64_t steps() const { return step_; }
  std::vector<AdamWMoments> moments(std::span<const Parameter> parameters);
  void go_on_from(std::int64_t steps) { step_ = steps; }

 private:
  struct Moments {
    Array m, v;
  };
  void keep_moments(std::span<const Parameter> parameters);

  AdamWOptions options_;
  std::vector<Moments> moments_;
  std::int64_t step_ = 0;
};

}  // namespace expar
