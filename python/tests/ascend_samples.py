"""What the tests of expar.ascend send, on threads as ranks."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

EXPERTS, TOKENS, HIDDEN, TOPK = 12, 6, 1024, 3
# Results are rounded to bf16's 8 bits, and their sum once more; sums of both signs may cancel.
ROUNDED = {"rtol": 2**-7, "atol": 2**-7}


def sample(context, tokens=TOKENS, experts=EXPERTS):
    """x, expert_ids and expert_scales of a rank."""
    g = torch.Generator().manual_seed(context.rank)
    x = torch.randn(tokens, HIDDEN, generator=g).bfloat16()
    ids = torch.stack([torch.randperm(experts, generator=g)[:TOPK] for _ in range(tokens)]).int()
    return x, ids, torch.rand(tokens, TOPK, generator=g)


def domain(context, **options):
    """What dispatch and combine are told alike."""
    told = dict(group_ep=context, ep_world_size=context.size, ep_rank_id=context.rank, moe_expert_num=EXPERTS)
    return {**told, **options}


def times_number(rows, counts, first):
    """Experts that multiply by their number plus one, in f32."""
    numbers = torch.arange(first + 1.0, first + 1 + len(counts)).repeat_interleave(counts)
    out = torch.full(rows.shape, torch.nan, dtype=rows.dtype)  # of rows that nobody sent
    out[: len(numbers)] = rows[: len(numbers)] * numbers[:, None]
    return out


def as_faked(call, *args, **kwargs):
    """What the operator returns, once a fake one has been seen to have its shapes and dtypes."""
    real = call(*args, **kwargs)
    with FakeTensorMode() as mode:
        args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        faked = call(*args, **kwargs)
    assert [(t.shape, t.dtype) for t in tree_leaves(faked)] == [(t.shape, t.dtype) for t in tree_leaves(real)]
    return real
