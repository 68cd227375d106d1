// The operators of torch_npu for expert parallelism, on any machine. docs/ascend.md says what differs on purpose.
#pragma once

#include <expar/ascend/activation.h>     // gated activations, plain, clipped and quantised
#include <expar/ascend/distribute.h>     // dispatch and combine, each in two phases
#include <expar/ascend/distribute_v2.h>  // both in one phase, with more options
#include <expar/ascend/domain.h>         // who holds which expert, and the sizes that follow
#include <expar/ascend/gating.h>         // from logits to experts
#include <expar/ascend/init_routing.h>   // rows of tokens by expert, with capacity and quantisation
#include <expar/ascend/matmul.h>         // the rows of groups times their matrices
#include <expar/ascend/permutation.h>    // rows from token order to expert order and back
#include <expar/ascend/placement.h>      // from experts to the instances of them
