// The operators of torch_npu for expert parallelism, on any machine. docs/ascend.md says what differs on purpose.
#pragma once

#include <expar/ascend/distribute.h>  // dispatch and combine, each in two phases
#include <expar/ascend/domain.h>      // who holds which expert, and the sizes that follow
