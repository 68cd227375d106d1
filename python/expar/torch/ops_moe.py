"""The layer as operators of torch: ``expar::moe`` and its gradient ``expar::moe_backward``.

Both are opaque to torch.compile, which sees their shapes alone. What a forward pass leaves for backward is attached to
the last of its results, see states.py.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

import expar

from .memory import recycled, rounded
from .ops import as_int32
from .states import attach, fake_handle, state_of

_numbers = itertools.count(1)
_cores: weakref.WeakValueDictionary[str, Core] = weakref.WeakValueDictionary()


class Core:
    """A layer of the library, and where its parameters stand in the operators' list of them.

    name   : what the operators call it by
    names  : of the parameters, in the operators' order: this rank's experts', then those of all ranks
    counts : [E] slots per expert of the passes that went backward since someone took them
    """

    def __init__(
        self,
        context: expar.Context,
        native: expar.MoeLayer,
        router: expar.RouterOptions,
        lent: bool = True,
        slices: Optional[expar.Communicator] = None,
    ) -> None:
        self.context = context
        self.slices = None if slices is None else context.on(slices)
        self.native = native
        self.router = router
        self.experts = [p.name for p in native.expert_parameters()] if lent else []
        self.names = self.experts + [p.name for p in native.dense_parameters()] if lent else []
        self.counts = [0] * router.experts
        self.has_losses = any(
            getattr(router, name) > 0
            for name in ("balance", "z", "sequence_balance", "importance", "importance_cv", "load")
        )
        self._lent: Optional[Sequence[int]] = None
        self.name = f"expar.layer.{next(_numbers)}"
        _cores[self.name] = self

    def lend(self, parameters: Sequence[Tensor]) -> None:
        """The library computes on these from here on; it keeps them alive, so that equal addresses are equal memory."""
        addresses = [p.data_ptr() for p in parameters]
        if addresses == self._lent:
            return
        self._lent = None
        self.native.lend(dict(zip(self.names, parameters)))
        self._lent = addresses

    def agreed(self, seed: Tensor) -> int:
        """The first rank's seed: jitter goes by the token, whatever P is, and slices see the same tokens. Collective."""
        seed = seed.detach().clone().view(1)
        for ranks in (self.context, self.slices):
            if ranks is not None:
                expar.broadcast(ranks, seed, 0)
        return int(seed)

    def read(self, selection_bias: Optional[Tensor], token_table: Optional[Tensor]) -> None:
        for mine, given in ((self.native.selection_bias, selection_bias), (self.native.token_table, token_table)):
            if mine is not None and given is not None:
                held = torch.from_dlpack(mine)
                if held.data_ptr() != given.data_ptr():
                    held.copy_(given)

    def counts_of(self, record: expar.MoeRecord, trains: bool) -> Sequence[int]:
        """[E] slots that the router gave each expert; at inference special experts are not counted."""
        counted = record.losses.counts_so_far if trains else record.capacity.chosen or list(record.plan.expert_totals)
        return list(counted) + [0] * (self.router.experts - len(counted))

    def backward(self, kept: _Kept, parameters: Sequence[Tensor], dout: Tensor, daux: float) -> List[Tensor]:
        if self.has_losses:
            # The losses are one number of all ranks: a rank's part of their gradient is wanted by every rank's loss.
            daux = _sum_over_ranks(self.context, daux)
        gradients = [recycled(p.shape, torch.float32) for p in parameters[: len(self.experts)]]
        self._lent = None
        self.native.lend(dict(zip(self.names, parameters)), dict(zip(self.experts, gradients)))
        dx = torch.empty_like(dout)
        self.native.backward(self.context, kept.record, dout, dx, loss_gradient=daux)
        self.lend(parameters)  # which lets go of the gradients
        for gradient, p in zip(self.native.dense_shard_gradients(), parameters[len(self.experts) :]):
            gradients.append(torch.from_dlpack(gradient).sum(0).reshape(p.shape))
        if not kept.counted:
            kept.counted = True
            self.counts = [a + b for a, b in zip(self.counts, self.counts_of(kept.record, True))]
        # Autograd owns what it gets: not the memory that the next pass writes.
        return [dx] + [rounded(g, p.dtype) for g, p in zip(gradients, parameters)]


class _Kept:
    """What a forward pass leaves."""

    def __init__(self, core: Core, record: expar.MoeRecord) -> None:
        self.core = core
        self.record = record
        self.counted = False


def _sum_over_ranks(context: expar.Context, value: float) -> float:
    total = torch.empty(1)
    expar.all_reduce(context, torch.tensor([[value]]), total)
    return float(total)


def _dense(tensor: Optional[Tensor]) -> Optional[Tensor]:
    return None if tensor is None else tensor.detach().contiguous()


@torch.library.custom_op("expar::moe", mutates_args=())
def moe(
    x: Tensor,
    parameters: List[Tensor],
    residual: Optional[Tensor],
    mask: Optional[Tensor],
    tokens: Optional[Tensor],
    selection_bias: Optional[Tensor],
    token_table: Optional[Tensor],
    seed: Optional[Tensor],
    ids: Optional[Tensor],
    layer: str,
    sequence: int,
    trains: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out = moe(x) + residual.

    x, residual : [T, H] of the layer's dtype
    parameters  : of Core.names, in the dtypes that the layer reads
    mask        : [T] int8, 0 is padding; tokens : [T] int32 ids
    seed        : [] int64 that the jitter of this call is drawn by
    ids         : [T, K] int32: go where an earlier pass went
    layer       : Core.name
    sequence    : tokens of each sequence
    returns     : out [T, H]; the sum of the router's losses [] f32; load [E] int64; dropped [] int64; ids [T, K] int32,
                  the router's choice; a handle
    Collective. Raises: as expar.MoeLayer.forward.
    """
    core = _cores[layer]
    x = _dense(x)
    if parameters:
        core.lend([_dense(p) for p in parameters])
    core.read(selection_bias, token_table)
    out = torch.empty_like(x)
    inputs: dict[str, Any] = {
        "residual": _dense(residual),
        "mask": None if mask is None else (mask != 0).to(torch.int8).contiguous(),
        "tokens": None if tokens is None else as_int32(tokens, "tokens"),
        "ids": None if ids is None else as_int32(ids, "ids"),
    }
    handle = torch.zeros(1, dtype=torch.float64)
    losses = 0.0
    if trains:
        record = expar.MoeRecord()
        if core.router.sequence_balance > 0:
            inputs["sequences"] = list(range(0, x.shape[0] + 1, max(sequence, 1)))
        if seed is not None:
            inputs.update(seed=core.agreed(seed), stream="jitter")
        core.native.forward(core.context, x, out, record=record, **inputs)
        losses = record.losses.total
        handle = attach(_Kept(core, record))
    else:
        core.native.forward(core.context, x, out, **inputs)
        record = core.native.inference_record()
    load = torch.tensor(core.counts_of(record, trains), dtype=torch.int64)
    dropped = torch.tensor(sum(record.capacity.dropped), dtype=torch.int64)
    chosen = torch.from_dlpack(record.routing.ids).clone()
    return out, torch.tensor(losses), load, dropped, chosen, handle


@moe.register_fake
def _(x, parameters, residual, mask, tokens, selection_bias, token_table, seed, ids, layer, sequence, trains):
    router = _cores[layer].router
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((router.experts,), dtype=torch.int64),
        x.new_empty((), dtype=torch.int64),
        x.new_empty((x.shape[0], expar.slots_of(router)), dtype=torch.int32),
        fake_handle(x),
    )


@torch.library.custom_op("expar::moe_backward", mutates_args=())
def moe_backward(
    dout: Tensor, dlosses: Tensor, handle: Tensor, x: Tensor, parameters: List[Tensor]
) -> List[Tensor]:
    """The gradients of x and of each of ``parameters``.

    Collective. Raises: as expar.MoeLayer.backward.
    """
    dense = [_dense(p) for p in parameters]
    kept = state_of(handle)
    return kept.core.backward(kept, dense, _dense(dout), float(dlosses))


@moe_backward.register_fake
def _(dout, dlosses, handle, x, parameters):
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *parameters)]


def _setup_context(ctx, inputs, output) -> None:
    x, parameters, residual = inputs[0], inputs[1], inputs[2]
    ctx.has_residual = residual is not None
    ctx.trains = inputs[11]
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(x, output[5], *parameters)


def _backward(ctx, dout, dlosses, *others):
    if not ctx.trains:
        raise RuntimeError("this pass was for inference and kept nothing to go backward from")
    x, handle, *parameters = ctx.saved_tensors
    dx, *gradients = moe_backward(dout, dlosses, handle, x, parameters)
    return dx, gradients, dout if ctx.has_residual else None, *[None] * 9


moe.register_autograd(_backward, setup_context=_setup_context)
