"""Which parameters are experts of which ranks: a mark on their module, which whoever averages gradients reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class ExpertShard:
    """``module.expert_shard``: all parameters of the module are this rank's shard of experts.

    which  : a number for each different shard; ranks with the same one hold the same values
    summed : over so many ranks' losses the gradients are sums already (the ranks along ep)
    slices : ranks that hold slices of the same experts and have the same tokens (the ranks along tp)
    """

    which: int
    summed: int
    slices: int = 1


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
