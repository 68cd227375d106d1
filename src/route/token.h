// What a router does with the logits of one token.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include <expar/router.h>

namespace expar {

/// Scores, choice and weights of one token after the other.
struct TokenForward {
  const RouterOptions& options;
  const RouteInputs& inputs;
  const float* logits;
  const Routing& routing;
  bool chooses = false;                     // by itself: the ids are not there yet
  std::span<const double> logit_bias = {};  // [E] for the choice, or empty
  std::int64_t slots = slots_of(options);

  /// What one task needs beside its tokens' own rows.
  struct Scratch {
    double* scores;  // [E]
    double* values;  // [E] what is compared
    double* best;    // [E]
    double* groups;  // [G]
    std::int32_t* used_groups;

    static constexpr std::int64_t kRows = 5;
    Scratch(const Tensor& memory, std::int64_t task, std::int64_t experts) {
      std::byte* at = memory.rows(task, 1).bytes();
      const auto take = [&] { return std::exchange(at, at + experts * static_cast<std::int64_t>(sizeof(double))); };
      scores = reinterpret_cast<double*>(take());
      values = reinterpret_cast<double*>(take());
      best = reinterpret_cast<double*>(take());
      groups = reinterpret_cast<double*>(take());
      used_groups = reinterpret_cast<std::int32_t*>(take());
    }
  };

  void token(std::int64_t t, const Scratch& scratch) const;
  /// The same where the kernel has left scores, ids and top as they are wanted.
  void token_of_kernel(std::int64_t t) const;

 private:
  float* row(const Tensor& tensor, std::int64_t t) const { return tensor.as<float>() + t * tensor.size(1); }
  std::int32_t* ids(std::int64_t t) const { return routing.ids.as<std::int32_t>() + t * slots; }
  /// A result of + - * / of numbers that this has rounded is that of f32, or of double.
  double rounded(double value) const { return options.double_scores ? value : double{static_cast<float>(value)}; }

  void score_by_softmax(std::int64_t t, double* scores) const;
  void score_each(std::int64_t t, double* scores) const;
  void compare(std::int64_t t, const Scratch& scratch) const;
  void choose(std::int64_t t, const Scratch& scratch) const;
  template <class Use>
  void for_candidates(const Scratch& scratch, Use use) const;
  double worth_of_group(std::int64_t group, const Scratch& scratch) const;
  void leave_out(std::int64_t t) const;
  template <class Number>
  void weigh(std::int64_t t, const Number* top) const;
};

}  // namespace expar
