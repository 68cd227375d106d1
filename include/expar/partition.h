// Hidden partition: all ranks have the same tokens, and each wants its slice of the hidden size of their results.
//
// Slice r of H columns are columns part_of(H, r, P), see collectives.h. The way is that of every other batch, with a
// replicated plan:
//
//   plan = make_replicated_plan(context, ids, {.experts = E})            no exchange: everyone knows all ids
//   join_slices(context, plan, slices, x)                                where ranks have slices of x, not all of it
//   inbox = dispatch(context, x, weights, plan)                          sends nothing: the owners have the rows
//   experts write into make_outbox(context, inbox, H, dtype)
//   combine(context, plan, y, weights, out, {.slice = true})             each rank reads its slice of its K rows
//
// The slices of all ranks together are the bytes that one rank computes alone. For inference.
// Source: "Integration Guide: All2All EP MoE in dlinfer", whose standard mode this is.
#pragma once

#include <expar/collectives.h>
#include <expar/dispatch.h>

namespace expar {

/// Rebuilds on each rank the rows that its experts read, from the slices of all ranks.
///   plan   : replicated
///   slices : [T, H_r]  columns part_of(H, rank, P) of all tokens, f32 or bf16
///   x      : [T, H]  rows of tokens that go to no expert here are left as they are
/// Collective: H and dtype are the same on all ranks.
/// Throws Error: bad_argument (a plan that is not replicated, or what it was refused for; a shape or dtype), no_memory,
/// mismatch, timeout, peer_lost, internal.
/// Cost: one read and one write of each slice on either side; it goes once to each other rank that needs its row.
void join_slices(const Context& context, const Plan& plan, ConstTensor slices, Tensor x);

}  // namespace expar
