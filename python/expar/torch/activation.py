"""The experts' activations as an operator: PyTorch's own depend in their last bit on how many rows lie beside a row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import Context
from .. import activate as native_activate
from .. import activate_grad as native_activate_grad
from .contexts import context_of, name_of

GATED = ("swiglu", "clamped_swiglu", "quick_geglu", "geglu")


def _width(pre: Tensor, name: str) -> int:
    return pre.shape[1] // 2 if name in GATED else pre.shape[1]


@torch.library.custom_op("expar::activate", mutates_args=())
def _activate(pre: Tensor, name: str, context: str) -> Tensor:
    h = pre.new_empty(pre.shape[0], _width(pre, name))
    native_activate(context_of(context), pre.detach().contiguous(), name, h)
    return h


@_activate.register_fake
def _(pre, name, context):
    return pre.new_empty(pre.shape[0], _width(pre, name))


@torch.library.custom_op("expar::activate_backward", mutates_args=())
def _activate_backward(pre: Tensor, dh: Tensor, name: str, context: str) -> Tensor:
    dpre = torch.empty_like(pre, memory_format=torch.contiguous_format)
    native_activate_grad(context_of(context), pre.detach().contiguous(), dh.contiguous(), name, dpre)
    return dpre


@_activate_backward.register_fake
def _(pre, dh, name, context):
    return torch.empty_like(pre, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output):
    pre, ctx.name, ctx.context = inputs
    ctx.held = context_of(ctx.context)
    ctx.save_for_backward(pre)


def _differentiate(ctx, dh):
    (pre,) = ctx.saved_tensors
    return torch.ops.expar.activate_backward(pre, dh, ctx.name, ctx.context), None, None


_activate.register_autograd(_differentiate, setup_context=_keep)


def activate(pre: Tensor, name: str, *, context: Context) -> Tensor:
    """act(pre), computed in f32 and rounded once, by expar's own kernel.

    pre  : [R, F] f32 or bf16; of the gated ones [R, 2F], gate then up
    name : "silu", "gelu", "relu2"; gated "swiglu", "clamped_swiglu", "quick_geglu", "geglu"
    returns [R, F]. An element's bytes depend on itself alone. Differentiable. Not collective.
    Raises BadArgument (another name, dtype or shape).
    """
    return torch.ops.expar.activate(pre, name, name_of(context))
