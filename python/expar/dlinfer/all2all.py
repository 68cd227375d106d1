"""The MoE call of the guide "All2All EP MoE in dlinfer": hidden states in slices, experts by the caller's kernel."""

from __future__ import annotations

import hashlib
from typing import Any, Callable, Mapping, NamedTuple, Optional, Protocol, Union

import numpy as np
import torch
from torch import Tensor

from .. import Context, all_gather
from ..errors import BadArgument, Mismatch, Unsupported
from ..torch.agree import told_to_all
from ..torch.ops import combine, dispatch
from ..torch.ranks import Where, numbered

PARTITIONS = ("sliced", "gathered")


class Config(Protocol):
    """What is read of a moe_config, of whatever class it is."""

    num_experts: int
    experts_per_token: int


class MoEConfig:
    """E experts, K of them for each token, shared out evenly over the ranks of the ep group."""

    def __init__(self, num_experts: int = 8, experts_per_token: int = 2, ep_world_size: int = 4) -> None:
        """Raises BadArgument (experts that the ranks cannot share out evenly)."""
        if num_experts % ep_world_size != 0:
            raise BadArgument(f"num_experts ({num_experts}) must be divisible by ep_world_size ({ep_world_size})")
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.num_local_experts = num_experts // ep_world_size


def fused_moe_all2all(
    hidden_states: Tensor,
    router_logits: Tensor,
    *,
    moe_config: Config,
    ep_group: Union[Where, Context],
    ep_rank: int,
    ep_size: int,
    expert_kernel: Callable[..., Tensor],
    expert_kwargs: Optional[Mapping[str, Any]] = None,
    apply_router_weight_on_input: bool = False,
    normalize_router_logits: bool = False,
    quant_type: Optional[str] = None,
    bias: Optional[Tensor] = None,
    partition: str = "sliced",
) -> Tensor:
    """This rank's slice of the MoE's output: columns [ep_rank * W, (ep_rank + 1) * W) with W = H / ep_size.

    hidden_states : [T, H] f32 or bf16. Only this rank's columns are read; where the slices of all ranks are to be joined
                    afterwards, all ranks have the same tokens. Else each has its own, of any number
    router_logits : [T, E]
    ep_group      : a process group, a DeviceMesh of one dim, or an expar.Context; None where ep_size is 1
    expert_kernel : called as expert_kernel(rows, **expert_kwargs, context=...); rows [N, D] stand expert by expert, and
                    it returns [N, D]. context is a dict of "group_list" [L] int64, "group_list_type", "counts" (rows of
                    each local expert) and "cumsum" (where they end). No row is padding, and N may be 0
    expert_kwargs : for the kernel; with a "group_list_type" of 0 group_list is the cumsum, with 1 or none the counts
    apply_router_weight_on_input : rows are multiplied by their weights before the experts, else the results after them
    normalize_router_logits : weights are the K largest of softmax(router_logits), else of the logits as they are
    quant_type    : None
    bias          : [W], or [H], of which it takes its columns; added to each row once
    partition     : "sliced": D = W, each expert is a function of W columns and sees each slice by itself; these are the
                    shapes of the guide, and a model of ep_size heads that share their routes. "gathered": D = H, experts
                    take whole rows, and the joined slices are what one process computes of the usual MoE
    returns       : [T, W]: out[t] = sum over its K experts of weight * this rank's slice of the expert's result, + bias

    Differentiable in hidden_states, router_logits, bias and whatever the kernel uses. Gradients of hidden_states and
    router_logits are those that this rank's slice has: their sum over the group is the whole one. Gradients of experts
    are those of the sum of all ranks' losses. Collective, backward too.
    Raises BadArgument, Unsupported (a quant_type), Mismatch (gathered, and ranks route other tokens), and as
    ``expar.torch.dispatch``: the same on every rank. Another exception of the kernel is for this rank to end with.
    Cost: each slice of a row travels once to each rank that has one of its experts, and its results once back;
    gathered, also a digest of the routes.
    """
    context = numbered(ep_group, ep_rank, ep_size, ("ep_rank", "ep_size"))
    kwargs = dict(expert_kwargs or {})
    with told_to_all(context):
        _check(hidden_states, router_logits, moe_config, ep_size, kwargs, quant_type, bias, partition)
    width = hidden_states.shape[1] // ep_size
    columns = slice(ep_rank * width, (ep_rank + 1) * width)

    scores = router_logits.float()
    weights, ids = (scores.softmax(-1) if normalize_router_logits else scores).topk(moe_config.experts_per_token)
    if partition == "gathered":
        _require_same(context, ids)
    on_input = apply_router_weight_on_input
    sent = dispatch(
        hidden_states[:, columns],
        ids,
        weights if on_input else None,
        context=context,
        experts=moe_config.num_experts,
    )
    rows = (sent.rows * sent.weights[:, None]).to(sent.rows.dtype) if on_input else sent.rows
    with told_to_all(context):
        if partition == "sliced":
            results = _run(expert_kernel, kwargs, rows, sent.counts)
        else:
            slices = _slices(context.size, sent.counts)
            whole = rows[slices.of_row].flatten(1)
            results = _run(expert_kernel, kwargs, whole, slices.counts)
            results = results.view(-1, width)[slices.of_row.flatten().argsort()]
    out = combine(results, sent, None if on_input else weights)
    if bias is None:
        return out
    return (out + (bias if bias.shape[0] == width else bias[columns])).to(out.dtype)


def _run(kernel: Callable[..., Tensor], kwargs: dict[str, Any], rows: Tensor, counts: Tensor) -> Tensor:
    """The kernel's results [N, D]."""
    kind = kwargs.get("group_list_type", 1)
    cumsum = counts.cumsum(0)
    told = {"group_list": counts if kind == 1 else cumsum, "group_list_type": kind, "counts": counts, "cumsum": cumsum}
    results = kernel(rows, **{**kwargs, "context": told})
    if not isinstance(results, Tensor) or results.shape != rows.shape:
        got = list(results.shape) if isinstance(results, Tensor) else type(results).__name__
        raise BadArgument(f"expert_kernel returned {got}, should be {list(rows.shape)}: row i is the result of rows[i]")
    return results


class _Slices(NamedTuple):
    """Where the slices of whole rows are among the rows that came."""

    of_row: Tensor  # [N, P] the slices of each whole row, in their order
    counts: Tensor  # [L] whole rows of each local expert


def _require_same(context: Context, ids: Tensor) -> None:
    """Collective."""
    mine = np.frombuffer(hashlib.sha256(ids.numpy().tobytes()).digest(), np.int32)[None]
    digests = np.empty((context.size, mine.shape[1]), np.int32)
    all_gather(context, mine, digests)
    for rank, digest in enumerate(digests):
        if (digest != digests[0]).any():
            raise Mismatch(
                f"ranks 0 and {rank} send their tokens to other experts: with partition='gathered' all ranks of the ep "
                "group hand in the same tokens"
            )


def _slices(size: int, counts: Tensor) -> _Slices:
    """Of the rows of an expert, those of rank 0 stand before those of rank 1: its slices 0, then its slices 1."""
    counts = counts // size
    each = counts.repeat_interleave(counts)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    first = starts * (size - 1) + torch.arange(len(each))
    return _Slices(first[:, None] + each[:, None] * torch.arange(size), counts)


def _check(
    x: Tensor,
    logits: Tensor,
    config: Config,
    ep_size: int,
    kwargs: dict[str, Any],
    quant_type: Optional[str],
    bias: Optional[Tensor],
    partition: str,
) -> None:
    if x.dim() != 2 or logits.shape != (x.shape[0], config.num_experts):
        raise BadArgument(
            f"hidden_states is {list(x.shape)}, router_logits {list(logits.shape)}; they should be [T, H] and "
            f"[T, {config.num_experts}]: flatten the leading axes"
        )
    hidden = x.shape[1]
    if hidden % ep_size != 0:
        raise BadArgument(
            f"hidden size must be divisible by ep_size: {hidden} columns for {ep_size} ranks; pad the hidden size, or "
            "take another ep_size"
        )
    if config.num_experts % ep_size != 0:
        raise BadArgument(f"num_experts ({config.num_experts}) must be divisible by ep_size ({ep_size})")
    if not 1 <= config.experts_per_token <= config.num_experts:
        raise BadArgument(
            f"experts_per_token is {config.experts_per_token}, should be in [1, {config.num_experts}]: a token has that "
            "many experts to choose from"
        )
    if quant_type is not None:
        raise Unsupported(f"quant_type is {quant_type!r}; this call carries rows as they are: leave it None")
    if bias is not None and bias.shape not in ((hidden,), (hidden // ep_size,)):
        raise BadArgument(f"bias is {list(bias.shape)}, should be [{hidden // ep_size}], or [{hidden}] for all ranks")
    if kwargs.get("group_list_type", 1) not in (0, 1):
        raise BadArgument(f"group_list_type is {kwargs['group_list_type']!r}, should be 0 (cumsum) or 1 (counts)")
    if partition not in PARTITIONS:
        raise BadArgument(f"partition is {partition!r}, should be one of {PARTITIONS}")
