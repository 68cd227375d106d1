"""torch_npu's operators for Mixture-of-Experts, on any machine: the same names, arguments, shapes and orders of rows.

::

    import expar.ascend as torch_npu

    name = torch_npu.get_hccl_comm_name(ep_group)  # of a gloo group; the group itself will do, too
    y, expand_idx, comm_cmd_info = torch_npu.npu_moe_distribute_dispatch_setup(x, expert_ids, name, 16, rank, 64)

Each is an operator of PyTorch, ``torch.ops.expar_ascend.<name>``, on the CPU. docs/ascend.md has what differs on purpose.
"""

from ..torch import alone as _alone  # says what it needs where there is no PyTorch
from .distribute_v2 import (
    npu_moe_distribute_combine_add_rms_norm,
    npu_moe_distribute_combine_v2,
    npu_moe_distribute_dispatch_v2,
)
from .groups import get_hccl_comm_name
from .placement import npu_moe_eplb_update_expert, npu_moe_update_expert

__all__ = [
    "get_hccl_comm_name",
    "npu_moe_distribute_combine_add_rms_norm",
    "npu_moe_distribute_combine_v2",
    "npu_moe_distribute_dispatch_v2",
    "npu_moe_eplb_update_expert",
    "npu_moe_update_expert",
]
