"""AIInfra's notebook on expert parallelism, "MoE from a single machine to many", on expar and under its own names.

::

    from expar.tutorial import EPMoE, MoEConfig, init_distributed

    init_distributed()                               # the ranks of torchrun
    cfg = MoEConfig(16, 2, 256, 128, in_dtype=torch.float32, out_dtype=torch.float32)
    model = EPMoE(cfg)
    out, aux_loss = model(torch.randn(32, 256))

What it leaves as future work is done: tokens go once to the ranks that hold their experts, nothing loops over tokens or
experts in Python, gradients come back the same way, and experts may have a capacity.
"""

from .all2all import PyTorchAllToAll
from .config import MoEConfig
from .experts import Expert, Experts
from .layer import EPMoE
from .training import init_distributed, train_tiny_ep

__all__ = ["EPMoE", "Expert", "Experts", "MoEConfig", "PyTorchAllToAll", "init_distributed", "train_tiny_ep"]
