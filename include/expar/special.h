// Experts that compute next to nothing, on the token's own rank: no row travels for them.
#pragma once

#include <cstdint>
#include <span>

#include <expar/context.h>

namespace expar {

/// How many there are of each kind. They are the last of a router's experts, in this order, and give, of a token x:
///   zero      nothing
///   copy      x
///   constant  a1 x + a2 v, where (a1, a2) = softmax(m1 . x, m2 . x)
/// Source: MoE++ (Jin et al. 2024); zero_expert_num, copy_expert_num and const_expert_num of
/// npu_moe_distribute_combine.
struct SpecialExperts {
  std::int64_t zero = 0, copy = 0, constant = 0;

  std::int64_t count() const { return zero + copy + constant; }
};

/// Tokens at the special experts.
struct SpecialPass {
  SpecialExperts experts;
  std::int64_t first = 0;  // the id of the first of them; slots with ids below it are left to others
  ConstTensor x;           // [T, H] f32
  ConstTensor ids;         // [T, K] int32 below first + count; -1: no expert
  ConstTensor weights;     // [T, K] f32
  ConstTensor mix;         // [constant, 2, H] f32: m1 and m2 of each
  ConstTensor value;       // [constant, H] f32: v of each
};

/// out[t] += weights[t, k] * y(t, k) of each slot of a special expert, in slot order.
///   out : [T, H] f32
/// Not collective. Throws Error: bad_argument (shapes or dtypes; an id that is no expert).
/// Cost: one read of x and one read and write of out per slot; two products x . m where an expert is constant.
void add_special(const Context& context, const SpecialPass& pass, Tensor out);

/// f32, of each of S shards, overwritten: [S, constant, 2, H] and [S, constant, H].
struct SpecialGradients {
  Tensor mix, value;
};

/// The gradient of add_special.
///   shards   : [S + 1] from 0 to T
///   dout     : [T, H] f32
///   dx       : [T, H] f32, added to
///   dweights : [T, K] f32, written at slots of special experts
/// Not collective. Throws Error: bad_argument (shapes or dtypes; an id that is no expert). Cost: twice that of
/// add_special; where experts are constant, x and dout are read once more.
void special_backward(const Context& context, const SpecialPass& pass, std::span<const std::int64_t> shards,
                      ConstTensor dout, Tensor dx, Tensor dweights, const SpecialGradients& gradients);

}  // namespace expar
