"""Data parallelism around expert parallelism: dense parameters are averaged, experts' gradients divided alike.

The gradients of experts are those of the sum of all ranks' losses (every rank's tokens have met them), those of dense
parameters of this rank's loss. Where the latter are averaged over ranks the former are divided, so that both are those
of the mean loss, as in one process. Replicas of the same experts (a dim dp beside ep) are summed first.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, Iterator, Optional, Sequence, Union

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .. import Context, all_gather, all_reduce, broadcast
from ..errors import BadArgument
from . import ranks
from .memory import recycled
from .shards import ExpertShard, expert_parameters, local_of

# Of the ranks of a context: those that hold the same experts as this one, by what all hold; None where it is alone.
_groups: weakref.WeakKeyDictionary[Context, dict[tuple, Optional[Context]]] = weakref.WeakKeyDictionary()


def _means(module: nn.Module, context: Context) -> list[tuple[str, nn.Parameter, _Mean]]:
    """What becomes of the gradient of each expert parameter. Collective: ranks tell each other, in one exchange, what
    they hold. Raises BadArgument (ranks that are a part of those that share experts; replicas that look like one)."""
    experts = list(expert_parameters(module))
    if not experts:
        return []
    mine = torch.tensor([[[shard.replica, shard.part, shard.slice] for _, _, shard in experts]])
    table = mine.new_empty(context.size, *mine.shape[1:])
    all_gather(context, mine, table)
    means = []
    for (name, parameter, shard), rows in zip(experts, table.transpose(0, 1).tolist()):
        means.append((name, parameter, _Mean(shard, _holders(name, shard, context, tuple(map(tuple, rows))))))
    return means


def _holders(name: str, shard: ExpertShard, context: Context, held: tuple) -> Optional[Context]:
    replicas = {replica for replica, _, _ in held}
    if len(set(held)) != context.size:
        raise BadArgument(
            f"several ranks say that they hold the same part of the same experts ({name}): make the layer with a process "
            "group, or with a mesh (or its ep.parallel) that has the replicas along a dim dp"
        )
    if len({row[:2] for row in held}) != len(replicas) * shard.parts:
        raise BadArgument(
            f"gradients are to be averaged over {context.size} ranks, which are only some of those that share experts, "
            f"{shard.parts} along ep: hand in a process group or mesh of all ranks that have different tokens"
        )
    known = _groups.setdefault(context, {})
    if held not in known:
        same = shard.part * shard.slices + shard.slice
        known[held] = context.on(context.communicator.split(same)) if len(replicas) > 1 else None
    return known[held]


class _Mean:
    """Turns this rank's gradients of a shard of experts into those of the mean loss of the ranks of ``context``."""

    def __init__(self, shard: ExpertShard, replicas: Optional[Context]) -> None:
        self.replicas = replicas
        self.divisor = shard.parts * (1 if self.replicas is None else self.replicas.size)

    def __call__(self, gradient: Tensor) -> Tensor:
        """Collective over the replicas."""
        if self.replicas is not None:
            total = torch.empty(gradient.numel())
            all_reduce(self.replicas, gradient.float().reshape(1, -1), total)
            gradient = total.view(gradient.shape).to(gradient.dtype)
        return torch.div(gradient, self.divisor, out=recycled(gradient.shape, gradient.dtype))

    def hook(self, gradient: Tensor) -> Tensor:
        """The same for a gradient that may be a DTensor."""
        mean = self(local_of(gradient))
        if not isinstance(gradient, DTensor):
            return mean
        mesh, placements = gradient.device_mesh, gradient.placements
        return DTensor.from_local(
            mean, mesh, placements, run_check=False, shape=gradient.shape, stride=gradient.stride()
        )


def distributed_data_parallel(module: nn.Module, **kwargs: Any) -> DistributedDataParallel:
    """DistributedDataParallel(module, **kwargs), which averages the dense parameters; experts stay out of it.

    Gradients are those of the mean of all ranks' losses. The process group holds whole groups of ranks that share
    experts. Replicas of experts begin with the values of the first, as dense parameters do. Collective over the process
    group. Raises BadArgument (a process group that holds a part of the ranks that share experts; adapters of experts).
    """
    context = ranks.context(kwargs.get("process_group") or kwargs.get("device_mesh"))
    keep_experts_out(module, context, same_values=kwargs.get("init_sync", True))
    return DistributedDataParallel(module, **kwargs)


def keep_experts_out(module: nn.Module, context: Context, same_values: bool = True) -> None:
    """Readies ``module`` for a DistributedDataParallel of the ranks of ``context`` that somebody else makes of it.

    same_values : replicas of experts take the values of the first
    Collective. Raises BadArgument as distributed_data_parallel.
    """
    _divide_on_the_way(module, context, same_values)
    ignored = getattr(module, _IGNORED, [])
    others = [] if isinstance(ignored, _Refusal) else ignored
    names = [*others, *(name for name, _, _ in expert_parameters(module))]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def refuse_plain_ddp(module: nn.Module, instead: str) -> None:
    """From now on torch's DistributedDataParallel(module), which would overwrite all ranks' experts with rank 0's, raises
    BadArgument that says what to use ``instead``, unless keep_experts_out has been called."""
    if not hasattr(module, _IGNORED):
        setattr(module, _IGNORED, _Refusal(instead))


# What DistributedDataParallel asks of the module that it is given.
_IGNORED = "_ddp_params_and_buffers_to_ignore"


class _Refusal:
    def __init__(self, instead: str) -> None:
        self._instead = instead

    def __iter__(self) -> Iterator[str]:
        raise BadArgument(
            "this model's experts differ on each rank, and DistributedDataParallel would make them alike: use "
            + self._instead
        )


def fully_shard(
    module: Union[nn.Module, Sequence[nn.Module]],
    *,
    mesh: Optional[DeviceMesh] = None,
    ignored_params: Optional[set[nn.Parameter]] = None,
    **kwargs: Any,
) -> FSDPModule:
    """torch.distributed.fsdp.fully_shard, which shards and averages the dense parameters; experts stay out of it.

    mesh : the ranks that have different tokens, in one dim or two (replicas, shards); None: all ranks
    Gradients are those of the mean of all ranks' losses. Like torch's it is called bottom-up, on blocks and then on the
    model, and all ranks begin with the same values. Collective over the mesh.
    Raises BadArgument (a mesh that holds a part of the ranks that share experts; adapters of experts).
    """
    context = ranks.context(mesh)
    ignored = set(ignored_params or ())
    for one in [module] if isinstance(module, nn.Module) else module:
        _divide_on_the_way(one, context)
        ignored.update(parameter for _, parameter, _ in expert_parameters(one))
    return torch_fully_shard(module, mesh=mesh, ignored_params=ignored, **kwargs)


@torch.no_grad()
def average_gradients(module: nn.Module, context: Optional[Context] = None) -> None:
    """Where neither DDP nor FSDP is in use: after backward, makes all gradients those of the mean of all ranks' losses.

    context : the ranks that have different tokens; None: all ranks
    Dense gradients are summed in f32 in rank order, in one exchange. A parameter that no rank has used keeps no
    gradient; one that some have used gets one on all. Collective.
    Raises BadArgument (ranks that are a part of those that share experts; adapters of experts; gradients that DDP or
    FSDP averages already).
    """
    context = context or ranks.context()
    experts = [parameter for _, parameter, _ in expert_parameters(module)]
    if any(hasattr(parameter, "_expar_divisor") for parameter in experts):
        raise BadArgument("average_gradients: DDP or FSDP, which the module is in, average its gradients already")
    apart = {id(parameter) for parameter in experts}
    _average([p for p in module.parameters() if p.requires_grad and id(p) not in apart], context)
    for _, parameter, mean in _means(module, context):
        if parameter.grad is None and mean.replicas is not None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # the other replicas may have one
        if parameter.grad is not None:
            gradient = local_of(parameter.grad)
            gradient.copy_(mean(gradient))


@torch.no_grad()
def clip_gradients(module: nn.Module, max_norm: float, context: Optional[Context] = None) -> Tensor:
    """Scales all gradients so that their norm, as one process would have it, is ``max_norm`` at the most.

    max_norm : math.inf leaves them as they are
    context  : all ranks that the module is on, those along tp too; None: all ranks
    returns  : [] f32, the norm before, the same bytes on every rank
    Each part of an expert or of a sharded parameter counts once, wherever it lies; torch.nn.utils.clip_grad_norm_ sees
    this rank's alone or refuses them. After backward, and average_gradients where that is in use. Collective.
    """
    context = context or ranks.context()
    parts = {id(p): shard.parts * shard.slices for _, p, shard in expert_parameters(module)}
    gradients = [(p.grad, parts.get(id(p)) or _parts_of(p.grad)) for p in module.parameters() if p.grad is not None]
    squares = torch.zeros(1, 1)
    for gradient, count in gradients:
        # This part is on so many ranks, which together count it once.
        squares += torch.linalg.vector_norm(local_of(gradient), dtype=torch.float32).square() * count / context.size
    total = torch.empty(1)
    all_reduce(context, squares, total)
    norm = total[0].sqrt()
    if max_norm < math.inf:
        for gradient, _ in gradients:
            local_of(gradient).mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _parts_of(tensor: Tensor) -> int:
    """Into how many different parts a tensor is cut over the ranks."""
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(n for n, how in zip(tensor.device_mesh.shape, tensor.placements) if how.is_shard())


def _average(parameters: Sequence[nn.Parameter], context: Context) -> None:
    """In one row: all gradients, then for each parameter whether this rank has one."""
    used = torch.tensor([float(p.grad is not None) for p in parameters])
    pieces = [local_of(p if p.grad is None else p.grad).float().flatten() * u for p, u in zip(parameters, used)]
    row = torch.cat([*pieces, used])
    total = torch.empty_like(row)
    all_reduce(context, row[None], total)
    *sums, used = total.split([*(piece.numel() for piece in pieces), len(parameters)])
    for parameter, summed, ranks_that_used_it in zip(parameters, sums, used):
        if ranks_that_used_it == 0:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = local_of(parameter.grad)
        gradient.copy_((summed / context.size).view(gradient.shape))


def _divide_on_the_way(module: nn.Module, context: Context, same_values: bool = False) -> None:
    """What backward adds to an expert parameter becomes its part of the mean. Once for each parameter."""
    for name, parameter, mean in _means(module, context):
        known = getattr(parameter, "_expar_divisor", None)
        if known is None:
            parameter._expar_divisor = mean.divisor
            trained = parameter.requires_grad
            # Frozen ones refuse a hook, and may be trained later.
            parameter.requires_grad_(True).register_hook(mean.hook)
            parameter.requires_grad_(trained)
            if same_values and mean.replicas is not None:
                broadcast(mean.replicas, local_of(parameter), 0)
        elif known != mean.divisor:
            raise BadArgument(f"{name} is averaged over {known} ranks already, and now should be over {mean.divisor}")
