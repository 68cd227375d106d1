"""Experts of the library between a dispatch and a combine, as one operator: for routers that PyTorch computes.

Rows are gathered where they lie and results written where their sources read them, so that nothing is packed or copied
between the three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Sequence

import torch
from torch import Tensor

from .. import (
    Context,
    ExpertGradients,
    ExpertShape,
    ExpertsRecord,
    ExpertsScratch,
    ExpertWeights,
    Inbox,
    Outbox,
    Plan,
    combine,
    dispatch,
    experts_backward,
    experts_forward,
    experts_of,
    fetch_slots,
    make_outbox,
    make_plan,
)
from ..errors import BadArgument
from .agree import told_to_all
from .contexts import context_of, name_of
from .memory import recycled, rounded
from .ops import DTYPES, as_int32
from .states import attach, fake_handle, state_of


# up, down, up_bias, down_bias
Parameters = tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]]


def _given(
    shape: ExpertShape, experts: int, up: Tensor, down: Tensor, up_bias: Optional[Tensor], down_bias: Optional[Tensor]
) -> ExpertWeights:
    """Raises BadArgument (what does not fit the shape and this rank's number of experts), before anything travels."""
    if (up_bias is None) != (down_bias is None):
        raise BadArgument("experts have both biases or neither: hand in up_bias and down_bias")
    wanted: dict[str, tuple[Optional[Tensor], list[int]]] = {
        "up": (up, [experts, shape.up_rows, shape.hidden]),
        "down": (down, [experts, shape.hidden, shape.inner]),
        "up_bias": (up_bias, [experts, shape.up_rows]),
        "down_bias": (down_bias, [experts, shape.hidden]),
    }
    for name, (p, sizes) in wanted.items():
        if p is not None and list(p.shape) != sizes:
            raise BadArgument(f"{name} is {list(p.shape)}, should be {sizes}: this rank has {experts} experts")
    for name, p in (("up", up), ("down", down)):
        if DTYPES.get(p.dtype) != shape.dtype:
            raise BadArgument(f"{name} is {p.dtype}, x is {shape.dtype}: cast one of them")
    biases = (None if b is None else b.detach().float().contiguous() for b in (up_bias, down_bias))
    return ExpertWeights(up.detach().contiguous(), down.detach().contiguous(), *biases)


@dataclass(frozen=True)
class Visit:
    """A pass forward, and what it leaves for the pass backward, which is handed the same parameters."""

    context: Context
    shape: ExpertShape
    plan: Plan
    inbox: Inbox
    y: Outbox
    record: ExpertsRecord
    payload: Optional[str]

    @staticmethod
    def forward(
        context: Context,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        parameters: Parameters,
        experts: int,
        activation: str,
        first_experts: Sequence[int] = (),
        payload: Optional[str] = None,
    ) -> tuple[Tensor, Visit]:
        """Collective. Memory of x is read again by backward."""
        x, weights = x.detach().contiguous(), weights.detach().contiguous()
        dtype, bias = DTYPES.get(x.dtype, str(x.dtype)), parameters[2] is not None
        first = list(first_experts)
        with told_to_all(context):
            if x.dim() != 2 or parameters[1].dim() != 3:
                shapes = f"x is {list(x.shape)}, down {list(parameters[1].shape)}"
                raise BadArgument(f"{shapes}; should be [T, H] and [L, H, F]")
            shape = ExpertShape(x.shape[1], parameters[1].shape[2], activation=activation, bias=bias, dtype=dtype)
            local = experts_of(context.rank, context.size, experts)[1]
            if first:
                local = first[context.rank + 1] - first[context.rank]
            given = _given(shape, local, *parameters)
            ids = as_int32(ids, "ids")
        plan = make_plan(context, ids, experts, first_experts=first)
        inbox = dispatch(context, x, weights, plan, payload=payload)
        y, record = make_outbox(context, inbox, shape.hidden, shape.dtype), ExpertsRecord()
        experts_forward(context, shape, given, inbox, y, record)
        out = torch.empty_like(x)
        combine(context, plan, y, weights, out)
        return out, Visit(context, shape, plan, inbox, y, record, payload)

    def backward(
        self, dout: Tensor, weights: Tensor, parameters: Parameters, wants_dx: bool = True
    ) -> tuple[Optional[Tensor], list[Tensor]]:
        """The gradients of x, of all ranks or none, and of weights and each of the parameters. Collective."""
        c, dout, weights = self.context, dout.contiguous(), weights.detach().contiguous()
        came = dispatch(c, dout, weights, self.plan, payload=self.payload, lists_of=self.inbox)
        trained = [p for p in parameters if p is not None]
        gradients = [recycled(p.shape, torch.float32) for p in trained]
        drows = make_outbox(c, self.inbox, self.shape.hidden, self.shape.dtype) if wants_dx else None
        dweights = make_outbox(c, self.inbox, 1)
        given, scratch = _given(self.shape, self.plan.local[1], *parameters), ExpertsScratch()
        experts_backward(
            c,
            self.shape,
            given,
            self.inbox,
            came,
            self.y,
            self.record,
            ExpertGradients(*gradients),
            drows,
            dweights,
            scratch,
        )
        dx = None
        if drows is not None:
            dx = torch.empty_like(dout)
            combine(c, self.plan, drows, None, dx)
        dslots = weights.new_empty(*weights.shape, 1)
        fetch_slots(c, self.plan, dweights, dslots)
        return dx, [dslots.squeeze(2), *(rounded(g, p.dtype) for g, p in zip(gradients, trained))]


@torch.library.custom_op("expar::visit_experts", mutates_args=())
def _visit_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Optional[Tensor],
    down_bias: Optional[Tensor],
    context: str,
    experts: int,
    activation: str,
    first_experts: Sequence[int],
    payload: Optional[str],
) -> tuple[Tensor, Tensor]:
    parameters = (up, down, up_bias, down_bias)
    out, visit = Visit.forward(
        context_of(context), x, ids, weights, parameters, experts, activation, first_experts, payload
    )
    return out, attach(visit)


@_visit_experts.register_fake
def _(x, ids, weights, up, down, up_bias, down_bias, context, experts, activation, first_experts, payload):
    return torch.empty_like(x, memory_format=torch.contiguous_format), fake_handle(x)


@torch.library.custom_op("expar::visit_experts_backward", mutates_args=())
def _visit_experts_backward(
    dout: Tensor,
    handle: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Optional[Tensor],
    down_bias: Optional[Tensor],
) -> list[Tensor]:
    visit: Visit = state_of(handle)
    dx, gradients = visit.backward(dout, weights, (up, down, up_bias, down_bias))
    assert dx is not None
    return [dx, *gradients]


@_visit_experts_backward.register_fake
def _(dout, handle, weights, up, down, up_bias, down_bias):
    like = [dout, weights, *(p for p in (up, down, up_bias, down_bias) if p is not None)]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]


def _keep(ctx, inputs, output):
    x, _ids, weights, up, down, up_bias, down_bias = inputs[:7]
    ctx.mark_non_differentiable(output[1])
    # x is read again by backward, through the inbox.
    ctx.save_for_backward(x, output[1], weights, up, down, up_bias, down_bias)


def _differentiate(ctx, dout, _dhandle):
    _x, *kept = ctx.saved_tensors
    dx, dweights, *gradients = torch.ops.expar.visit_experts_backward(dout, *kept)
    dup, ddown, dup_bias, ddown_bias = (*gradients, None, None)[:4]
    return dx, None, dweights, dup, ddown, dup_bias, ddown_bias, None, None, None, None, None


_visit_experts.register_autograd(_differentiate, setup_context=_keep)


def visit_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Optional[Tensor] = None,
    down_bias: Optional[Tensor] = None,
    *,
    context: Context,
    experts: int,
    activation: str = "swiglu",
    first_experts: Sequence[int] = (),
    payload: Optional[str] = None,
) -> Tensor:
    """out[t] = sum over slots k of weights[t, k] * expert(ids[t, k])(x[t]), in slot order, in f32, rounded once, where
    expert(x) = down act(up x + up_bias) + down_bias.

    x             : [T, H] f32 or bf16; T may differ per rank and be 0
    ids           : [T, K] integers in [-1, experts); -1 is left out
    weights       : [T, K] f32
    up            : [L, F, H], of gated activations [L, 2F, H], gate then up; L experts of this rank, of x's dtype
    down          : [L, H, F] likewise
    up_bias       : [L, F] or [L, 2F], and down_bias [L, H], both or neither
    activation    : "swiglu", "clamped_swiglu", "quick_geglu", "geglu"; plain "gelu" (exact), "silu", "relu2"
    context, experts, first_experts, payload : as ``dispatch``
    returns       : [T, H] of x's dtype
    Differentiable in x, weights and the experts' parameters, whose gradients are of the sum of all ranks' losses.
    Collective, backward too. Raises BadArgument, Mismatch, NoMemory, Timeout, PeerLost: the same on every rank.
    Cost: a row travels once to each other rank; each weight is read once forwards and once backwards.
    """
    where = (name_of(context), experts, activation, list(first_experts), payload)
    return torch.ops.expar.visit_experts(x, ids, weights, up, down, up_bias, down_bias, *where)[0]
