"""Which parameters are experts of which ranks: a mark on their module, which whoever averages gradients reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class ExpertShard:
    """``module.expert_shard``: all parameters of the module are this rank's shard of experts.

    part, parts   : place along ep and ranks there, over whose losses the gradients are sums already
    slice, slices : place along tp and ranks there, which have the same tokens
    replica       : a number for each set of all experts, where there are several (along dp)
    """

    part: int
    parts: int
    slice: int = 0
    slices: int = 1
    replica: int = 0


def expert_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ExpertShard]]:
    """(name, parameter, shard) of every expert parameter in ``module``, in its order."""
    for prefix, child in module.named_modules():
        shard = getattr(child, "expert_shard", None)
        if shard is not None:
            for name, parameter in child.named_parameters(prefix):
                yield name, parameter, shard


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, without its history; writable."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
