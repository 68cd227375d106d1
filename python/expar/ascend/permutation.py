"""Rows from token order to expert order, and back. Not collective; all raise BadArgument (shapes, dtypes, indices)."""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

from .. import _native
from ..torch import alone
from .operators import Gradient, dense, new_like, operator, refuse_unless, taken


def _kept(a):
    """Rows that are left of a row for each slot."""
    slots, asked = a.indices.numel(), a.num_out_tokens or 0
    return min(asked, slots) if asked > 0 else slots + asked


@operator(fake=lambda a: new_like(a.tokens))
def npu_moe_token_permute_grad(
    tokens: Tensor, grad_permuted_tokens: Tensor, indices: Tensor, sorted_indices: Tensor, padded_mode: bool = False
) -> Tensor:
    """The gradient of the tokens: the sum of those of their rows, in f32, rounded once. Rows of f32 or bf16."""
    refuse_unless(padded_mode=(padded_mode, False))
    return taken(
        _native._ascend_moe_token_permute_grad(
            alone(), dense(grad_permuted_tokens), dense(sorted_indices), tokens.shape[0]
        )
    )


def _keep_permuted(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _permute_backward(ctx, grad, _):
    return torch.ops.expar_ascend.npu_moe_token_permute_grad(ctx.saved_tensors[0], grad, *ctx.saved_tensors[1:]), *[None] * 3


@operator(
    fake=lambda a: (
        a.tokens.new_empty(_kept(a), a.tokens.shape[1]),
        a.tokens.new_empty(a.indices.numel(), dtype=torch.int32),
    ),
    gradient=Gradient(_keep_permuted, _permute_backward),
)
def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: Optional[int] = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """A row for each slot, sorted by ``indices``; slots of equal index keep their order.

    tokens         : [N, H] of any dtype
    indices        : [N, K] or [N] int32 or int64, the experts of each token
    num_out_tokens : rows that are kept, of the first; None and 0: all; below 0: all but so many
    returns        : permuted_tokens [rows, H], sorted_indices [N K] int32, the place of each slot
    Differentiable in tokens of f32 and bf16.
    """
    refuse_unless(padded_mode=(padded_mode, False))
    rows, places = _native._ascend_moe_token_permute(dense(tokens), dense(indices), num_out_tokens or 0)
    return taken(rows), taken(places)


@operator(fake=lambda a: (new_like(a.permuted_tokens), torch.empty(0) if a.probs is None else new_like(a.probs)))
def npu_moe_token_unpermute_grad(
    permuted_tokens: Tensor,
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Optional[Tensor] = None,
    padded_mode: bool = False,
    restore_shape: Optional[Sequence[int]] = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of npu_moe_token_unpermute: of the rows, and of probs, of no elements without them."""
    refuse_unless(padded_mode=(padded_mode, False), restore_shape=(restore_shape, None))
    rows, of_probs = _native._ascend_moe_token_unpermute_grad(
        alone(), dense(grad_unpermuted_tokens), dense(permuted_tokens), dense(sorted_indices), dense(probs)
    )
    return taken(rows), taken(of_probs)


def _keep_unpermuted(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _unpermute_backward(ctx, grad):
    rows, places, probs = ctx.saved_tensors
    of_rows, of_probs = torch.ops.expar_ascend.npu_moe_token_unpermute_grad(rows, grad, places, probs)
    return of_rows, None, None if probs is None else of_probs, None, None


@operator(
    fake=lambda a: a.permuted_tokens.new_empty(
        a.sorted_indices.shape[0] if a.probs is None else a.probs.shape[0], a.permuted_tokens.shape[1]
    ),
    gradient=Gradient(_keep_unpermuted, _unpermute_backward),
)
def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Optional[Tensor] = None,
    padded_mode: bool = False,
    restore_shape: Optional[Sequence[int]] = None,
) -> Tensor:
    """out[n] = the sum over k of probs[n, k] * permuted_tokens[sorted_indices[n K + k]], in f32, rounded once; dropped rows
    are zero.

    permuted_tokens : [rows, H] f32 or bf16
    sorted_indices  : [N K] int32, of npu_moe_token_permute or another
    probs           : [N, K] f32, bf16 or f16; None: K is 1 and each weight is one
    returns         : [N, H]
    Differentiable in permuted_tokens and probs.
    """
    refuse_unless(padded_mode=(padded_mode, False), restore_shape=(restore_shape, None))
    return taken(
        _native._ascend_moe_token_unpermute(alone(), dense(permuted_tokens), dense(sorted_indices), dense(probs))
    )


def _rerouted(a):
    scales, ranks = a.per_token_scales, a.expert_token_num_per_rank
    return (
        new_like(a.tokens),
        torch.empty(0) if scales is None else new_like(scales),
        a.tokens.new_empty(a.tokens.shape[0], dtype=torch.int32),
        ranks.new_empty(ranks.shape[1]),
    )


@operator(fake=_rerouted)
def npu_moe_re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    *,
    per_token_scales: Optional[Tensor] = None,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
    tokens_dtype: Optional[int] = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows that stand rank by rank and expert by expert in each, brought expert by expert and rank by rank in each.

    tokens                    : [A, H] of any dtype
    expert_token_num_per_rank : [ranks, E] int32 or int64, whose sum is A
    per_token_scales          : [A] or [A, S], moved with their rows
    returns : permute_tokens [A, H]; permute_per_token_scales, of no elements without scales; permute_token_idx [A] int32;
              expert_token_num [E], counts, or with expert_token_num_type 0 their sums so far
    """
    refuse_unless(tokens_dtype=(tokens_dtype, None))
    made = _native._ascend_moe_re_routing(
        dense(tokens),
        dense(expert_token_num_per_rank),
        per_token_scales=dense(per_token_scales),
        expert_token_num_type=expert_token_num_type,
        idx_type=idx_type,
    )
    rows, scales, places, counts = map(taken, made)
    return rows, scales, places, counts


def _tokens(a):
    slots = a.expanded_src_to_dst_row.shape[0]
    return a.expanded_permuted_rows.new_empty(
        slots if a.scales is None else a.scales.shape[0], a.expanded_permuted_rows.shape[-1]
    )


@operator(fake=_tokens)
def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Optional[Tensor],
    skip2: Optional[Tensor],
    bias: Optional[Tensor],
    scales: Optional[Tensor],
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Optional[Tensor],
    drop_pad_mode: Optional[int] = 0,
    k: Optional[int] = 1,
) -> Tensor:
    """out[n] = skip1[n] + skip2[n] + the sum over k of scales[n, k] * (rows[row of (n, k)] + bias[expert of (n, k)]), in
    this order, in f32, rounded once. A slot without a row adds nothing.

    expanded_permuted_rows  : [rows, H], with drop_pad_mode 1 and 3 [E, C, H]; f32, bf16 or f16
    skip1, skip2            : [N, H]; bias [E, H] with export_for_source_row [N, K] int32
    scales                  : [N, K]; None: K is 1 and each weight is one. ``k`` is not read
    expanded_src_to_dst_row : [N K] int32; -1: none
    drop_pad_mode           : 0, 1: slot (n, k) is the (k N + n)th; 2, 3: the (n K + k)th
    returns                 : [N, H]
    """
    return taken(
        _native._ascend_moe_finalize_routing(
            alone(),
            dense(expanded_permuted_rows),
            dense(skip1),
            dense(skip2),
            dense(bias),
            dense(scales),
            dense(expanded_src_to_dst_row),
            dense(export_for_source_row),
            drop_pad_mode or 0,
        )
    )


@operator(fake=lambda a: a.sorted_expert_for_source_row.new_empty(a.num_expert))
def npu_moe_compute_expert_tokens(sorted_expert_for_source_row: Tensor, num_expert: int) -> Tensor:
    """Rows of experts up to each: out[e] counts the elements that are not above e.

    sorted_expert_for_source_row : [M] int32, ascending · returns [num_expert] int32
    """
    return taken(_native._ascend_moe_compute_expert_tokens(dense(sorted_expert_for_source_row), num_expert))
