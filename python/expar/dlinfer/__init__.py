"""dlinfer's MoE calls over expar's ranks, on the CPU: programs change their import line.

::

    from expar.dlinfer import MoEConfig, fused_moe_all2all    # of the guide "All2All EP MoE in dlinfer"
    from expar.dlinfer import MoeMetadata, fused_moe          # of dlinfer's operators
    from expar.dlinfer import moe                             # moe.fused_moe_all2all: of dlinfer's vendor module

Two functions of one name in dlinfer are two here: the guide's takes router logits and a kernel, and slices the hidden
states; the module's takes ids and weights, and carries whole rows.
"""

from . import moe
from .all2all import MoEConfig, fused_moe_all2all
from .moe import MoECommType, MoeMetadata, fused_moe

__all__ = ["MoECommType", "MoEConfig", "MoeMetadata", "fused_moe", "fused_moe_all2all", "moe"]
