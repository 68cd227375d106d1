"""The rows of groups times their matrices."""

from __future__ import annotations

from typing import Any, Optional, Sequence, Union

import torch
from torch import Tensor

from .. import _native
from ..errors import BadArgument
from ..torch import alone
from .operators import Gradient, dense, dtype_name, operator, refuse_unless, taken

Tensors = Optional[Sequence[Tensor]]


def _product(a):
    dtype = a.output_dtype or a.x.dtype
    if a.group_type == 2:
        return a.x.new_empty(a.group_list.shape[0], a.x.shape[0], a.weight.shape[1], dtype=dtype)
    return a.x.new_empty(a.x.shape[0], a.weight.shape[2], dtype=dtype)


def _keep(ctx, inputs, output):
    x, weight, bias, scale, per_token_scale, group_list, ctx.group_type, ctx.group_list_type, _ = inputs
    if not x.is_floating_point():
        raise BadArgument(f"a grouped product of {x.dtype} has no gradient")
    ctx.bias = bias is not None
    ctx.save_for_backward(x, weight, group_list)


def _backward(ctx, grad):
    x, weight, groups = ctx.saved_tensors
    grad = grad.to(x.dtype)

    def product(rows, matrices, group_type):
        return torch.ops.expar_ascend.grouped_matmul(
            rows, matrices, None, None, None, groups, group_type, ctx.group_list_type, None
        )

    if ctx.group_type == 2:
        of_x, of_weight = product(weight, grad.transpose(1, 2), 0).t(), product(x.t(), grad, 0)
    else:
        of_x, of_weight = product(grad, weight.transpose(1, 2), 0), product(x.t(), grad, 2)
    of_bias = product(grad.new_ones(1, grad.shape[0]), grad, 2)[:, 0] if ctx.bias else None
    return of_x, of_weight, of_bias, *[None] * 6


@operator(fake=_product, gradient=Gradient(_keep, _backward))
def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    scale: Optional[Tensor],
    per_token_scale: Optional[Tensor],
    group_list: Tensor,
    group_type: int,
    group_list_type: int,
    output_dtype: Optional[torch.dtype],
) -> Tensor:
    """npu_grouped_matmul of one tensor each."""
    return taken(
        _native._ascend_grouped_matmul(
            alone(),
            dense(x.t() if group_type == 2 else x),
            dense(weight),
            bias=dense(bias),
            scale=dense(scale),
            per_token_scale=dense(per_token_scale),
            group_list=dense(group_list),
            group_type=group_type,
            group_list_type=group_list_type,
            output_dtype=dtype_name(output_dtype),
        )
    )


def _only(what: str, tensors: Union[Tensor, Tensors]) -> Any:
    """The one tensor of a list; None of None and of an empty one."""
    if tensors is None or isinstance(tensors, Tensor) or len(tensors) == 0:
        return tensors if isinstance(tensors, Tensor) else None
    if len(tensors) == 1:
        return tensors[0]
    raise BadArgument(f"{what} is a list of {len(tensors)} tensors, should be of one: stack them and pass a group_list")


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Tensors = None,
    scale: Tensors = None,
    offset: Tensors = None,
    antiquant_scale: Tensors = None,
    antiquant_offset: Tensors = None,
    per_token_scale: Tensors = None,
    group_list: Union[Tensor, Sequence[int], None] = None,
    activation_input: Tensors = None,
    activation_quant_scale: Tensors = None,
    activation_quant_offset: Tensors = None,
    split_item: Optional[int] = 0,
    group_type: Optional[int] = None,
    group_list_type: Optional[int] = 0,
    act_type: Optional[int] = 0,
    tuning_config: Optional[Sequence[int]] = None,
    output_dtype: Optional[torch.dtype] = None,
) -> list[Tensor]:
    """The rows of each group times its matrix (group_type 0), or the sum over each group (2).

    x          : a list of one: [M, K], f32, bf16, f16 or int8; of group_type 2 the transposed view of what has a row for
                 each that is summed, [M, K]
    weight     : a list of one: [E, K, N], of group_type 2 [K, N]
    bias       : a list of one: [E, N]; of int8 rows scale [E, N] and per_token_scale [M], f32
    group_list : [E] int64, with group_list_type 0 sums so far, 1 counts; a list of numbers is one of sums
    returns    : a list of one: [M, N], of group_type 2 [E, M, N]; rows beyond the groups are zeros
    split_item and tuning_config are not read. Differentiable in x, weight and bias, of floats. Not collective.
    Raises BadArgument (also: lists of several tensors, weight-only quantisation, a fused activation).
    """
    for what, tensors in (
        ("offset", offset),
        ("antiquant_scale", antiquant_scale),
        ("antiquant_offset", antiquant_offset),
        ("activation_input", activation_input),
        ("activation_quant_scale", activation_quant_scale),
        ("activation_quant_offset", activation_quant_offset),
    ):
        refuse_unless(**{what: (_only(what, tensors), None)})
    refuse_unless(act_type=(act_type or 0, 0))
    if group_list is None or not isinstance(x, (list, tuple)) or not isinstance(weight, (list, tuple)):
        raise BadArgument("npu_grouped_matmul takes lists of one tensor each, and needs a group_list")
    if not isinstance(group_list, Tensor):
        group_list, group_type = torch.tensor(group_list, dtype=torch.int64), group_type or 0
    if group_type not in (0, 2):
        raise BadArgument(f"group_type is {group_type}, should be 0, groups of rows, or 2, groups of what is summed")
    product = grouped_matmul(
        _only("x", x),
        _only("weight", weight),
        _only("bias", bias),
        _only("scale", scale),
        _only("per_token_scale", per_token_scale),
        group_list,
        group_type,
        group_list_type or 0,
        output_dtype,
    )
    return [product]
