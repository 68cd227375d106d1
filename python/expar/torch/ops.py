"""Dispatch, combine and grouped products as operators of PyTorch: with gradients, traced by torch.compile.

Each communicates once where it says Collective: every rank calls it, in the same order, backward included. Tensors are f32
or bf16 on the CPU. What a pass leaves for its gradient is tied to ``Dispatched.handle`` and freed with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from .. import Context, Inbox, Plan, all_reduce, experts_of, fetch_slots, make_outbox, make_plan
from .. import combine as native_combine
from .. import dispatch as native_dispatch
from .. import grouped_mm as native_grouped_mm
from .. import grouped_mm_to_rows, grouped_mm_to_weights
from ..errors import BadArgument
from .agree import told_to_all
from .contexts import context_of, name_of
from .states import attach, fake_handle, state_of

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class _Pass:
    """What dispatch leaves for combine and for the gradients of both."""

    context: Context
    plan: Plan
    inbox: Inbox
    payload: Optional[str]
    slices: Optional[Context]

    def again(self, rows: Tensor, weights: Optional[Tensor]) -> Inbox:
        """``rows`` [T, H] go the way of the tokens; without weights only they travel."""
        lists = self.inbox if weights is None else None
        return native_dispatch(
            self.context, rows, weights, self.plan, layout="expert_major", payload=self.payload, lists_of=lists
        )

    def home(self, rows: Tensor, weights: Optional[Tensor]) -> Tensor:
        """``rows`` [R, H] by expert, summed by token."""
        with told_to_all(self.context):
            if rows.dtype not in DTYPES or rows.dim() != 2 or rows.shape[0] != self.plan.received:
                raise BadArgument(
                    f"combine: y is {rows.dtype} {list(rows.shape)}, should be float32 or bfloat16 "
                    f"[{self.plan.received}, H]: row i is the result of dispatched.rows[i]"
                )
        y = make_outbox(self.context, self.inbox, rows.shape[1], DTYPES[rows.dtype])
        torch.from_dlpack(y.rows).copy_(rows)
        out = rows.new_empty(self.plan.tokens, rows.shape[1])
        sum_over = None if self.slices is None else self.slices.communicator
        native_combine(self.context, self.plan, y, weights, out, sum_over=sum_over)
        return out

    def by_slot(self, values: Tensor) -> Tensor:
        """``values`` [R] f32 by expert, as [T, K]; summed over slices, each of which has a part."""
        y = make_outbox(self.context, self.inbox, 1, "f32")
        torch.from_dlpack(y.rows).copy_(values[:, None])
        out = values.new_empty(self.plan.tokens, self.plan.topk, 1)
        fetch_slots(self.context, self.plan, y, out)
        if self.slices is not None:
            parts, out = out, torch.empty(out.numel())
            all_reduce(self.slices, parts.view(1, -1), out)
        return out.view(self.plan.tokens, self.plan.topk)


def as_int32(numbers: Tensor, what: str) -> Tensor:
    """Whole numbers as the library takes them; what int32 cannot hold stays out of any range.

    Raises BadArgument (numbers that are not whole).
    """
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise BadArgument(f"{what} is {numbers.dtype}, should be integers")
    return numbers.detach().clamp(-(2**31), 2**31 - 1).to(torch.int32).contiguous()


class Dispatched(NamedTuple):
    """Rows that came to this rank's experts, and what takes their results home."""

    rows: Tensor  # [R, H], expert by expert, in global token order in each
    weights: Tensor  # [R] f32, the router's weight of each row
    counts: Tensor  # [L] int64 rows of each local expert
    handle: Tensor
    tokens: int  # T
    topk: int  # K


@torch.library.custom_op("expar::dispatch", mutates_args=())
def _dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Optional[Tensor],
    context: str,
    experts: int,
    first_experts: Sequence[int],
    payload: Optional[str],
    slices: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = context_of(context)
    x, weights = x.detach().contiguous(), None if weights is None else weights.detach().contiguous()
    with told_to_all(c):
        ids = as_int32(ids, "ids")
    plan = make_plan(c, ids, experts, first_experts=list(first_experts))
    inbox = native_dispatch(c, x, weights, plan, layout="expert_major", payload=payload)
    return (
        torch.from_dlpack(inbox.packed),
        torch.from_dlpack(inbox.weights).clone(),
        torch.tensor(plan.rows),
        attach(_Pass(c, plan, inbox, payload, context_of(slices) if slices else None)),
    )


@_dispatch.register_fake
def _(x, ids, weights, context, experts, first_experts, payload, slices):
    c = context_of(context)
    if first_experts:
        local = first_experts[c.rank + 1] - first_experts[c.rank]
    else:
        local = experts_of(c.rank, c.size, experts)[1]
    received = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(received, x.shape[1]),
        x.new_empty(received, dtype=torch.float32),
        x.new_empty(local, dtype=torch.int64),
        fake_handle(x),
    )


@torch.library.custom_op("expar::dispatch_backward", mutates_args=())
def _dispatch_backward(
    drows: Tensor, dweights: Optional[Tensor], handle: Tensor, tokens: int, topk: int
) -> tuple[Tensor, Tensor]:
    state = state_of(handle)
    dx = state.home(drows.contiguous(), None)
    if dweights is None:
        return dx, drows.new_empty(0, topk, dtype=torch.float32)
    return dx, state.by_slot(dweights.contiguous())


@_dispatch_backward.register_fake
def _(drows, dweights, handle, tokens, topk):
    slots = drows.new_empty(0 if dweights is None else tokens, topk, dtype=torch.float32)
    return drows.new_empty(tokens, drows.shape[1]), slots


def _keep_for_dispatch_backward(ctx, inputs, output):
    x, ids, weights = inputs[:3]
    ctx.tokens, ctx.topk, ctx.weighted = x.shape[0], ids.shape[1], weights is not None
    ctx.set_materialize_grads(True)
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.save_for_backward(output[3])


def _differentiate_dispatch(ctx, drows, dweights, _dcounts, _dhandle):
    (handle,) = ctx.saved_tensors
    dx, dslots = torch.ops.expar.dispatch_backward(
        drows, dweights if ctx.weighted else None, handle, ctx.tokens, ctx.topk
    )
    return dx, None, dslots if ctx.weighted else None, None, None, None, None, None


_dispatch.register_autograd(_differentiate_dispatch, setup_context=_keep_for_dispatch_backward)


def dispatch(
    x: Tensor,
    ids: Tensor,
    weights: Optional[Tensor] = None,
    *,
    context: Context,
    experts: int,
    first_experts: Sequence[int] = (),
    payload: Optional[str] = None,
    slices: Optional[Context] = None,
) -> Dispatched:
    """Carries each token once to each other rank that holds one of its experts.

    x             : [T, H] f32 or bf16; T may differ per rank and be 0
    ids           : [T, K] integers in [-1, experts); -1 is not routed
    weights       : [T, K] f32, travel beside the rows; None: every weight is 1
    context       : the ranks
    experts       : E
    first_experts : [P + 1] where each rank's experts begin; empty: rank r holds floor(r E / P) to floor((r + 1) E / P) - 1
    payload       : how rows and their gradients travel: None (as they are), "bf16", "f16", "int8", "fp8_e4m3"; the
                    gradient of the rounding is taken as one
    slices        : ranks that hold slices of the same experts and hand in the same tokens (tensor parallelism): combine
                    sums their parts, and so does the gradient of x
    Differentiable in x and weights. Collective, backward too: the gradient of x is an unweighted combine.
    Raises BadArgument, Mismatch, NoMemory, Timeout, PeerLost: the same on every rank.
    """
    out = torch.ops.expar.dispatch(
        x, ids, weights, name_of(context), experts, list(first_experts), payload, name_of(slices)
    )
    return Dispatched(*out, x.shape[0], ids.shape[1])


@torch.library.custom_op("expar::combine", mutates_args=())
def _combine(y: Tensor, weights: Optional[Tensor], handle: Tensor, tokens: int) -> Tensor:
    weights = None if weights is None else weights.detach().contiguous()
    return state_of(handle).home(y.detach(), weights)


@_combine.register_fake
def _(y, weights, handle, tokens):
    return y.new_empty(tokens, y.shape[1])


@torch.library.custom_op("expar::combine_backward", mutates_args=())
def _combine_backward(
    dout: Tensor, y: Optional[Tensor], weights: Optional[Tensor], handle: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    state = state_of(handle)
    inbox = state.again(dout.contiguous(), None if weights is None else weights.detach().contiguous())
    dy = torch.from_dlpack(inbox.packed)
    if weights is None:
        return dy, dout.new_empty(0, dtype=torch.float32)
    dots = (dy.float() * y.float()).sum(1)
    return dy * torch.from_dlpack(inbox.weights)[:, None].to(dy.dtype), state.by_slot(dots)


@_combine_backward.register_fake
def _(dout, y, weights, handle, rows):
    slots = dout.new_empty(0, dtype=torch.float32) if weights is None else weights.new_empty(weights.shape)
    return dout.new_empty(rows, dout.shape[1]), slots


def _keep_for_combine_backward(ctx, inputs, output):
    y, weights, handle, _tokens = inputs
    ctx.rows, ctx.weighted = y.shape[0], weights is not None
    ctx.save_for_backward(*((handle, y, weights) if ctx.weighted else (handle,)))


def _differentiate_combine(ctx, dout):
    handle, y, weights = (*ctx.saved_tensors, None, None)[:3]
    dy, dweights = torch.ops.expar.combine_backward(dout, y, weights, handle, ctx.rows)
    return dy, dweights if ctx.weighted else None, None, None


_combine.register_autograd(_differentiate_combine, setup_context=_keep_for_combine_backward)


def combine(y: Tensor, dispatched: Dispatched, weights: Optional[Tensor] = None) -> Tensor:
    """Brings the experts' results home: out[t] = sum over slots k of weights[t, k] * result(t, k), in slot order, in f32.

    y       : [R, H], row i the result of ``dispatched.rows[i]``
    weights : [T, K] f32; None: slots are summed as they are
    returns : [T, H] of y's dtype, rounded once
    Differentiable in y and weights. Collective, backward too: the gradient of y is a dispatch with the same plan.
    Raises: as dispatch. Cost: beside the combine one copy of y, into memory that the other ranks can read.
    """
    return torch.ops.expar.combine(y, weights, dispatched.handle, dispatched.tokens)


@torch.library.custom_op("expar::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, w: Tensor, counts: Tensor, context: str, transposed: bool = False) -> Tensor:
    y = x.new_empty(x.shape[0], w.shape[2 if transposed else 1])
    multiply = grouped_mm_to_rows if transposed else native_grouped_mm
    multiply(context_of(context), x.detach().contiguous(), w.detach().contiguous(), counts.tolist(), y)
    return y


@_grouped_mm.register_fake
def _(x, w, counts, context, transposed=False):
    return x.new_empty(x.shape[0], w.shape[2 if transposed else 1])


@torch.library.custom_op("expar::grouped_mm_backward", mutates_args=())
def _grouped_mm_backward(
    dy: Tensor, x: Tensor, w: Tensor, counts: Tensor, context: str, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    c, sizes, dy = context_of(context), counts.tolist(), dy.contiguous()
    x, w = x.detach().contiguous(), w.detach().contiguous()
    dx, dw = torch.empty_like(x), w.new_empty(w.shape, dtype=torch.float32)
    if transposed:
        native_grouped_mm(c, dy, w, sizes, dx)
        grouped_mm_to_weights(c, x, dy, sizes, dw)
    else:
        grouped_mm_to_rows(c, dy, w, sizes, dx)
        grouped_mm_to_weights(c, dy, x, sizes, dw)
    return dx, dw.to(w.dtype)


@_grouped_mm_backward.register_fake
def _(dy, x, w, counts, context, transposed=False):
    return x.new_empty(x.shape), w.new_empty(w.shape)


def _keep_for_grouped_mm_backward(ctx, inputs, output):
    x, w, counts, ctx.context, ctx.transposed = inputs
    ctx.held = context_of(ctx.context)
    ctx.save_for_backward(x, w, counts)


def _differentiate_grouped_mm(ctx, dy):
    dx, dw = torch.ops.expar.grouped_mm_backward(dy, *ctx.saved_tensors, ctx.context, ctx.transposed)
    return dx, dw, None, None, None


_grouped_mm.register_autograd(_differentiate_grouped_mm, setup_context=_keep_for_grouped_mm_backward)


def grouped_mm(x: Tensor, w: Tensor, counts: Tensor, *, context: Context, transposed: bool = False) -> Tensor:
    """y[i] = w[g(i)] x[i], where the rows of x stand group by group, ``counts[g]`` of each.

    x          : [R, K]
    w          : [L, N, K] of the same dtype; transposed: [L, K, N], which is read as it lies
    counts     : [L] integers
    returns    : [R, N]
    An element's bytes depend on its row and its weights alone: neither on the rows beside it nor on threads.
    Differentiable in x and w, whose gradient sums a group's rows in their order. Not collective.
    Raises BadArgument (shapes or dtypes).
    """
    return torch.ops.expar.grouped_mm(x, w, counts, name_of(context), transposed)


@torch.library.custom_op("expar::sum_over", mutates_args=())
def _sum_over(x: Tensor, context: str) -> Tensor:
    rows = x.detach().to(torch.float32).contiguous().view(1, -1)
    total = torch.empty(rows.shape[1])
    all_reduce(context_of(context), rows, total)
    return total.view(x.shape).to(x.dtype, copy=False)


@_sum_over.register_fake
def _(x, context):
    return x.new_empty(x.shape)


@torch.library.custom_op("expar::copy_over", mutates_args=())
def _copy_over(x: Tensor, context: str) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@_copy_over.register_fake
def _(x, context):
    return x.new_empty(x.shape)


def _keep_context(ctx, inputs, output):
    ctx.context = inputs[1]
    ctx.held = context_of(ctx.context)


_sum_over.register_autograd(
    lambda ctx, dout: (torch.ops.expar.copy_over(dout, ctx.context), None), setup_context=_keep_context
)
_copy_over.register_autograd(
    lambda ctx, dout: (torch.ops.expar.sum_over(dout, ctx.context), None), setup_context=_keep_context
)


def reduce_over(x: Tensor, context: Context) -> Tensor:
    """The sum of all ranks' x, in f32 in rank order, rounded once; its gradient is passed on as it is.

    For what ranks with slices of the same matrix computed: each has a part, and all go on with the sum. Collective
    forwards.
    """
    return torch.ops.expar.sum_over(x, name_of(context))


def copy_over(x: Tensor, context: Context) -> Tensor:
    """x, whose gradient is the sum of all ranks' gradients.

    For what all ranks have alike and each multiplies with a slice of a matrix. Collective backwards.
    """
    return torch.ops.expar.copy_over(x, name_of(context))
