// The whole of expar. A first reading: this page, layer.h, dispatch.h, plan.h, then src/dispatch/.
#pragma once

#include <expar/capacity.h>      // bound_rows: at most so many rows per expert
#include <expar/carried.h>       // make_carried: ranks whose bytes somebody else carries
#include <expar/collectives.h>   // barrier, broadcast, all_gather, all_reduce, reduce_scatter, all_to_all_v
#include <expar/communicator.h>  // Communicator: ranks that work together
#include <expar/context.h>       // Context: ranks, kernels, threads; passed to every call
#include <expar/dispatch.h>      // dispatch and combine
#include <expar/error.h>         // Error: code, rank, peer, operation
#include <expar/experts.h>       // the experts' networks
#include <expar/hidden_moe.h>    // HiddenMoe: the layer of ranks that all have the same tokens
#include <expar/layer.h>         // MoeLayer: route, plan, dispatch, experts, combine in one object
#include <expar/mesh.h>          // Mesh: ranks in a grid, and the groups along its dims
#include <expar/norm.h>          // RMSNorm
#include <expar/operation.h>     // Operation: the protocol, for authors of collectives
#include <expar/optimizer.h>     // AdamW
#include <expar/parallel.h>      // Parallel: which ranks of a mesh share tokens, experts, slices
#include <expar/partition.h>     // all ranks have the same tokens, each a slice of the hidden size
#include <expar/permute.h>       // rows from rank-major to expert-major and back
#include <expar/plan.h>          // make_plan: who sends which row where
#include <expar/random.h>        // numbers keyed by what they are for
#include <expar/registry.h>      // run_threads, join, launch; what is available
#include <expar/router.h>        // route: K experts per token
#include <expar/special.h>       // zero, copy and constant experts
#include <expar/tensor.h>        // Tensor, ConstTensor: views; Array, Buffer: memory
#include <expar/trace.h>         // Trace: what each rank did, and when
