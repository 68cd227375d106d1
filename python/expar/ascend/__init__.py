"""torch_npu's operators for Mixture-of-Experts, on any machine: the same names, arguments, shapes and orders of rows.

::

    import expar.ascend as torch_npu

    name = torch_npu.get_hccl_comm_name(ep_group)  # of a gloo group; the group itself will do, too
    y, expand_idx, comm_cmd_info = torch_npu.npu_moe_distribute_dispatch_setup(x, expert_ids, name, 16, rank, 64)

Each is an operator of PyTorch, ``torch.ops.expar_ascend.<name>``, on the CPU. docs/ascend.md has what differs on purpose.
"""

from ..torch import alone as _alone  # noqa: F401  says what it needs where there is no PyTorch
from .activation import (
    npu_clipped_swiglu,
    npu_dequant_swiglu_quant,
    npu_swiglu,
    npu_swiglu_backward,
    npu_swiglu_quant,
)
from .distribute import (
    npu_moe_distribute_combine_setup,
    npu_moe_distribute_combine_teardown,
    npu_moe_distribute_dispatch_setup,
    npu_moe_distribute_dispatch_teardown,
)
from .distribute_v2 import (
    npu_moe_distribute_combine_add_rms_norm,
    npu_moe_distribute_combine_v2,
    npu_moe_distribute_dispatch_v2,
)
from .gating import npu_moe_gating_top_k, npu_moe_gating_top_k_softmax
from .groups import get_hccl_comm_name
from .init_routing import npu_moe_init_routing, npu_moe_init_routing_v2
from .matmul import npu_grouped_matmul
from .permutation import (
    npu_moe_compute_expert_tokens,
    npu_moe_finalize_routing,
    npu_moe_re_routing,
    npu_moe_token_permute,
    npu_moe_token_permute_grad,
    npu_moe_token_unpermute,
    npu_moe_token_unpermute_grad,
)
from .placement import npu_moe_eplb_update_expert, npu_moe_update_expert

__all__ = [name for name in dir() if name.startswith("npu_")] + ["get_hccl_comm_name"]
