"""Which parameters are experts of which ranks: a mark on their module, which whoever averages gradients reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Optional, Union

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .. import Communicator, Context, Parallel
from ..errors import BadArgument
from . import ranks

Where = Union[None, Context, Communicator, Parallel, DeviceMesh, ProcessGroup]


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


def shard_over(where: Where) -> tuple[Context, Optional[Communicator], ExpertShard]:
    """The ranks that tokens travel among, those that hold slices of the same experts, and which this rank's are.

    where : a DeviceMesh with dims as for ranks.parallel; a process group, or None, is what ranks.context makes of it
    Collective over these ranks. Raises as those do.
    """
    replica = ranks.first_of(where)
    if isinstance(where, DeviceMesh):
        where = ranks.parallel(where)
    slices = None
    if isinstance(where, Parallel):
        replica = where.replicas.rank if where.replicas else replica
        where, slices = where.experts, where.tensor
    if isinstance(where, Communicator):
        where = Context(where)
    context = where if isinstance(where, Context) else ranks.context(where)
    slice_, of = (slices.rank, slices.size) if slices else (0, 1)
    return context, slices, ExpertShard(context.rank, context.size, slice_, of, replica)


def expert_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ExpertShard]]:
    """(name, parameter, shard) of every expert parameter in ``module``, in its order. Raises as refuse_adapters."""
    for prefix, child in module.named_modules():
        shard = getattr(child, "expert_shard", None)
        if shard is not None:
            refuse_adapters(module, prefix, child)
            for name, parameter in child.named_parameters(prefix):
                yield name, parameter, shard


def refuse_adapters(model: nn.Module, name: str, experts: nn.Module) -> None:
    """Raises BadArgument where weights of ``experts``, which are ``name`` in ``model``, are computed from others: by
    torch's parametrizations, or in a wrapper that calls what it wraps base_layer, as PEFT's do.

    Those others know nothing of ranks: what belongs to different experts would be averaged.
    """
    outer = name
    while outer.rpartition(".")[2] == "base_layer":
        outer = outer.rpartition(".")[0]
    own = {id(p) for path, p in experts.named_parameters() if ".parametrizations." not in f".{path}"}
    for path, parameter in model.get_submodule(outer).named_parameters(outer):
        if id(parameter) not in own:
            raise BadArgument(
                f"{path} changes the weights of the experts {outer}, of which each rank has others: keep adapters and "
                "parametrizations off experts (PEFT: target_parameters), elsewhere they are fine"
            )


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, without its history; writable."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
