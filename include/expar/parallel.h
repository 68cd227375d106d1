// How the ranks of a mesh share the tokens and experts of a layer.
#pragma once

#include <vector>

#include <expar/context.h>
#include <expar/mesh.h>

namespace expar {

/// Ranks along dims of a mesh, each of which may be missing:
///   dp  replicas of the experts, with other tokens
///   ep  tokens travel among these
///   tp  slices of the same experts (up and down by the inner dimension F), with the same tokens
///
/// The usual styles are the dims that are there: ExpertParallel {ep}, TensorParallel {tp}, where no token travels,
/// ExpertTensorParallel {ep, tp}; and replicas beside each, {dp, ...}.
///
///   Parallel ranks(context, {{"ep", 4}, {"tp", 2}});
///   options.tensor = ranks.tensor;
///   MoeLayer layer(ranks.experts, options);
///
/// Source: ExpertParallel, TensorParallel and ExpertTensorParallel of HyperParallel.
struct Parallel {
  Context all;
  Context data;     // along dp and ep: ranks with other tokens; what is not an expert is data parallel over them
  Context experts;  // along ep
  Communicator replicas{};  // along dp; empty: there is one
  Communicator tensor{};    // along tp; empty: nothing is in slices

  /// All ranks along ep.
  Parallel(const Context& whole) : all(whole), data(whole), experts(whole) {}  // NOLINT: a job without a mesh
  /// No dims: all ranks along ep. Collective. Throws Error: bad_argument (a dim of another name), as Mesh.
  /// Cost: the meetings of a Mesh and three more.
  Parallel(const Context& whole, const std::vector<MeshDim>& dims);

  int replica_count() const { return replicas ? replicas.size() : 1; }
  int slice_count() const { return tensor ? tensor.size() : 1; }
  int slice() const { return tensor ? tensor.rank() : 0; }
  /// The rank of `data` that holds the experts of rank `r` of `experts`, in the first replica.
  int holder(int r) const { return r * stride; }

  int stride = 1;  // in `data` between neighbours along ep
};

/// Throws Error: bad_argument, naming the dim that is none of these.
void check_dims(const std::vector<MeshDim>& dims);

}  // namespace expar
