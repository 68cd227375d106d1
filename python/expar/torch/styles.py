"""Expert, tensor and both parallelisms for ``torch.distributed.tensor.parallel.parallelize_module``.

::

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    parallelize_module(model, mesh, {"layers.*.experts": ExpertParallel()})

A style replaces w1, w2 and w3 by DTensors and wraps the module's forward; it keeps nothing of a call, so that one style
serves any number of layers. What goes in and comes out is what one process would give and get: rows sorted by expert.
"""

from __future__ import annotations

import functools
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from .. import Context
from ..errors import BadArgument
from . import ranks
from .agree import told_to_all
from .contexts import context_of, name_of
from .ops import Dispatched, combine, copy_over, dispatch, reduce_over
from .shards import ExpertShard

WEIGHTS = ("w1", "w2", "w3")
# The axis of F in each.
INNER = {"w1": 1, "w2": 2, "w3": 1}


def first_experts(experts: int, size: int) -> list[int]:
    """[P + 1] where each rank's experts begin, as DTensor's Shard(0) has it: ceil(E / P) each, the last fewer."""
    each = -(-experts // size)
    return [min(rank * each, experts) for rank in range(size + 1)]


class Way(NamedTuple):
    """To the experts and back."""

    context: Context
    slices: Optional[Context]
    first: list[int]  # [P + 1] where each rank's experts begin


class _Style(ParallelStyle):
    """What the three have in common."""

    dims: tuple[str, ...]

    def apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """As ``parallelize_module(module, device_mesh, self)``.

        module      : a GroupedExperts, or any module with parameters w1, w3 [E, F, H] and w2 [E, H, F] whose forward
                      takes (routed_input [N, H] sorted by expert, num_tokens_per_expert [E])
        device_mesh : on the CPU
        Returns the module, changed in place: its weights are those of the mesh's first rank. Collective over the mesh.
        Raises BadArgument (another module, another mesh, a style applied twice).
        """
        return self._apply(module, device_mesh)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        run = self.partition(module, device_mesh)
        module.forward = functools.partial(run, module.forward)
        return module

    def partition(self, module: nn.Module, device_mesh: DeviceMesh) -> Callable[..., Tensor]:
        """What apply does to the weights. Returns run(local forward, routed_input, num_tokens_per_expert)."""
        _check_mesh(type(self).__name__, self.dims, device_mesh)
        _check_module(type(self).__name__, module)
        experts = module.w1.shape[0]
        for name in WEIGHTS:
            whole = getattr(module, name)
            part = distribute_tensor(
                whole.detach(), device_mesh, self.placements(name), src_data_rank=self.src_data_rank
            )
            module.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))
        module.context, module.expert_shard, run = self.plan(device_mesh, experts)
        return run

    def placements(self, name: str) -> list[Placement]:
        """How the parameter of that name lies on the mesh."""
        raise NotImplementedError

    def plan(self, mesh: DeviceMesh, experts: int) -> tuple[Context, ExpertShard, Callable[..., Tensor]]:
        """Where the experts compute, which they are, and what partition returns."""
        raise NotImplementedError


class ExpertParallel(_Style):
    """Each rank holds some experts, whole; tokens travel. For a mesh of one dim.

    Weights are Shard(0). forward takes this rank's rows, sorted by expert, with a count for each of all E experts, and
    returns their results in the same order. Output and gradients are the same bytes for every number of ranks; the
    gradients of experts are those of the sum of all ranks' losses. Every rank's output must take part in its loss, also
    where it has no rows: the gradients travel too. Collective, backward too.
    """

    dims = ("ep",)

    def placements(self, name: str) -> list[Placement]:
        return [Shard(0)]

    def way(self, mesh: DeviceMesh, experts: int) -> Way:
        """Collective over the mesh, the first time."""
        context = ranks.context(mesh)
        return Way(context, None, first_experts(experts, context.size))

    def plan(self, mesh: DeviceMesh, experts: int):
        way = self.way(mesh, experts)
        shard = ExpertShard(way.context.rank, way.context.size, replica=_replica(mesh))
        return way.context, shard, functools.partial(_travel, way)


class TensorParallel(_Style):
    """Each rank holds a slice of every expert; all ranks hand in the same tokens. For a mesh of one dim.

    w1 and w3 are Shard(1), w2 is Shard(2). forward returns the complete results on every rank: it sums the slices, as
    backward does for the input's gradient, and leaves no all-reduce to the caller. A slice may be empty. Collective,
    backward too.
    """

    dims = ("tp",)

    def placements(self, name: str) -> list[Placement]:
        return [Shard(INNER[name])]

    def plan(self, mesh: DeviceMesh, experts: int):
        context = ranks.context(mesh)
        shard = ExpertShard(0, 1, context.rank, context.size, _replica(mesh))
        return context, shard, functools.partial(_in_slices, context)


class ExpertTensorParallel(_Style):
    """Experts are spread along ep and sliced along tp. For a mesh of dims ("ep", "tp").

    w1 and w3 are [Shard(0), Shard(1)], w2 is [Shard(0), Shard(2)]. Ranks that differ along tp alone hand in the same
    tokens; tokens travel along ep. forward returns the complete results on every rank. Collective, backward too.
    """

    dims = ("ep", "tp")

    def placements(self, name: str) -> list[Placement]:
        return [Shard(0), Shard(INNER[name])]

    def way(self, mesh: DeviceMesh, experts: int) -> Way:
        """Collective over the mesh, the first time."""
        context = ranks.context(mesh["ep"])
        slices = context.on(ranks.communicator(mesh["tp"]))
        return Way(context, slices, first_experts(experts, context.size))

    def plan(self, mesh: DeviceMesh, experts: int):
        context, slices, _ = way = self.way(mesh, experts)
        shard = ExpertShard(context.rank, context.size, slices.rank, slices.size, _replica(mesh))
        return context, shard, functools.partial(_travel, way)


def _replica(mesh: DeviceMesh) -> int:
    """Different for meshes that have no rank in common."""
    return int(mesh.mesh.min())


@torch.library.custom_op("expar::experts_of_rows", mutates_args=())
def _experts_of_rows(counts: Tensor, rows: int, experts: int, context: str) -> Tensor:
    """[rows, 1] of rows that are sorted by expert. An operator, so that traced ranks too tell the others what is wrong."""
    with told_to_all(context_of(context)):
        if counts.shape != (experts,):
            raise BadArgument(
                f"num_tokens_per_expert is {list(counts.shape)}, should be [{experts}]: one for every expert"
            )
        if counts.sum() != rows:
            raise BadArgument(f"num_tokens_per_expert adds up to {counts.sum()}, routed_input has {rows} rows")
        return torch.arange(experts).repeat_interleave(counts)[:, None]


@_experts_of_rows.register_fake
def _(counts, rows, experts, context):
    return counts.new_empty(rows, 1, dtype=torch.int64)


def send(way: Way, x: Tensor, counts: Tensor) -> Dispatched:
    """``x`` [N, H], sorted by expert, ``counts`` [E] for each, to the experts; combine brings the results home."""
    experts = way.first[-1]
    ids = torch.ops.expar.experts_of_rows(counts, x.shape[0], experts, name_of(way.context))
    return dispatch(x, ids, context=way.context, experts=experts, first_experts=way.first, slices=way.slices)


def _travel(way: Way, forward: Callable[..., Tensor], x: Tensor, counts: Tensor) -> Tensor:
    sent = send(way, x, counts)
    return combine(forward(sent.rows, sent.counts), sent)


def _in_slices(context: Context, forward: Callable[..., Tensor], x: Tensor, counts: Tensor) -> Tensor:
    return reduce_over(forward(copy_over(x, context), counts), context)


def _check_mesh(style: str, dims: tuple[str, ...], mesh: DeviceMesh) -> None:
    sizes = (2,) * len(dims)
    wanted = f"init_device_mesh('cpu', {sizes}, mesh_dim_names={dims})"
    if not isinstance(mesh, DeviceMesh):
        raise BadArgument(f"{style} takes a DeviceMesh and got {type(mesh).__name__}: {wanted}")
    if mesh.device_type != "cpu":
        raise BadArgument(f"{style} got a mesh on '{mesh.device_type}'; expar computes on the CPU: {wanted}")
    if mesh.ndim != len(dims) or (mesh.ndim > 1 and mesh.mesh_dim_names != dims):
        part = "mesh['" + "', '".join(dims) + "']"
        got = mesh.mesh_dim_names or f"{mesh.ndim} without names"
        raise BadArgument(f"{style} takes a mesh of dims {dims} and got {got}: hand in {part}, or {wanted}")


def _check_module(style: str, module: nn.Module) -> None:
    def refuse(why: str) -> None:
        raise BadArgument(
            f"{style} cannot slice {type(module).__name__}: {why}. Name the experts in the plan: "
            f"parallelize_module(model, mesh, {{'layers.*.experts': {style}()}})"
        )

    shapes = {}
    for name in WEIGHTS:
        parameter = getattr(module, name, None)
        if not isinstance(parameter, nn.Parameter) or parameter.dim() != 3:
            refuse(f"it has no parameter {name} of three axes, as GroupedExperts has")
        if isinstance(parameter, DTensor):
            refuse(f"{name} is sliced already")
        shapes[name] = tuple(parameter.shape)
    experts, inner, hidden = shapes["w1"]
    if shapes["w3"] != shapes["w1"] or shapes["w2"] != (experts, hidden, inner):
        refuse(f"w1 is {list(shapes['w1'])}, w2 {list(shapes['w2'])} and w3 {list(shapes['w3'])}")
