"""Gated activations. Not collective; all raise BadArgument (shapes, dtypes, an option out of its range)."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .. import _native
from ..torch import alone
from .operators import Gradient, dense, new_like, operator, refuse_unless, taken


def _half(x, dim):
    shape = list(x.shape)
    shape[dim] //= 2
    return x.new_empty(shape)


@operator(fake=lambda a: new_like(a.self))
def npu_swiglu_backward(grad_output: Tensor, self: Tensor, dim: int = -1) -> Tensor:
    """The gradient of npu_swiglu's tensor."""
    return taken(_native._ascend_swiglu_grad(alone(), dense(grad_output), dense(self), dim))


def _keep(ctx, inputs, output):
    x, ctx.dim = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    return torch.ops.expar_ascend.npu_swiglu_backward(grad, *ctx.saved_tensors, ctx.dim), None


@operator(fake=lambda a: _half(a.self, a.dim), gradient=Gradient(_keep, _backward))
def npu_swiglu(self: Tensor, dim: int = -1) -> Tensor:
    """silu(a) * b of the halves a and b of an axis; in f32, rounded once.

    self : f32, bf16 or f16, any shape · returns half as much along ``dim`` · Differentiable.
    """
    return taken(_native._ascend_swiglu(alone(), dense(self), dim))


@operator(fake=lambda a: _half(a.x, a.dim))
def npu_clipped_swiglu(
    x: Tensor,
    *,
    group_index: Optional[Tensor] = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    """a sigmoid(alpha a) * (b + bias) with a = min(a, limit), b = clamp(b, -limit, limit), of GPT-OSS.

    x           : f32, bf16 or f16; a and b take turns along ``dim`` or, not interleaved, are its halves
    group_index : [G] int64 rows of each group: rows beyond their sum are zeros
    """
    return taken(
        _native._ascend_clipped_swiglu(
            alone(),
            dense(x),
            group_index=dense(group_index),
            dim=dim,
            alpha=alpha,
            limit=limit,
            bias=bias,
            interleaved=interleaved,
        )
    )


def _quantised(a):
    rows, width = a.x.shape
    return (
        a.x.new_empty(rows, width // 2, dtype=torch.int8),
        a.x.new_empty(rows if a.quant_mode == 1 else 0, dtype=torch.float32),
    )


@operator(fake=_quantised)
def npu_swiglu_quant(
    x: Tensor,
    *,
    smooth_scales: Optional[Tensor] = None,
    offsets: Optional[Tensor] = None,
    group_index: Optional[Tensor] = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    group_list_type: int = 0,
    dst_type: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    """SwiGLU of rows, then int8.

    x             : [T, 2H] f32, bf16 or f16
    smooth_scales : [H], or of each group [G, H] or [G], f32; offsets likewise, with quant_mode 0
    group_index   : [G] int64; with group_list_type 0 sums so far, 1 counts
    activate_left : silu of the first half; off: of the second
    returns       : y [T, H] int8, scale [T] f32, of no elements with quant_mode 0
    """
    refuse_unless(dst_type=(dst_type, None, torch.int8))
    y, scale = _native._ascend_swiglu_quant(
        alone(),
        dense(x),
        smooth_scales=dense(smooth_scales),
        offsets=dense(offsets),
        group_index=dense(group_index),
        activate_left=activate_left,
        quant_mode=quant_mode,
        group_list_type=group_list_type,
    )
    return taken(y), taken(scale)


@operator(fake=_quantised)
def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Optional[Tensor] = None,
    activation_scale: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    quant_scale: Optional[Tensor] = None,
    quant_offset: Optional[Tensor] = None,
    group_index: Optional[Tensor] = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: Optional[torch.dtype] = None,
    round_mode: Optional[int] = None,
    activate_dim: Optional[int] = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """npu_swiglu_quant of x * weight_scale * activation_scale + bias, in f32.

    x : [T, 2H] int32 sums of an int8 product, or f32, bf16 or f16; scales are f32
    Not: swiglu_mode 1 with clamp_limit, glu_alpha and glu_bias, which npu_clipped_swiglu has.
    """
    refuse_unless(
        dst_type=(dst_type, None, torch.int8),
        round_mode=(round_mode, None, 0),
        activate_dim=(activate_dim, None, -1),
        swiglu_mode=(swiglu_mode, 0),
    )
    y, scale = _native._ascend_dequant_swiglu_quant(
        alone(),
        dense(x),
        weight_scale=dense(weight_scale),
        activation_scale=dense(activation_scale),
        bias=dense(bias),
        quant_scale=dense(quant_scale),
        quant_offset=dense(quant_offset),
        group_index=dense(group_index),
        activate_left=activate_left,
        quant_mode=quant_mode,
    )
    return taken(y), taken(scale)
