"""What the examples of expar.ascend share: ranks as processes, what they send, and what must come back."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from typing import Any, Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Sample(NamedTuple):
    """One rank's inputs of a dispatch with quant_mode 2."""

    x: torch.Tensor  # [BS, H] bf16
    expert_ids: torch.Tensor  # [BS, K] int32, different ones in a row
    expert_scales: torch.Tensor  # [BS, K] f32
    scales: torch.Tensor  # [1 + E, H] f32, the shared expert's first; the same on all ranks


def sample(rank: int, bs: int, h: int, k: int, experts: int) -> Sample:
    """Another one for each rank, always the same."""
    g = torch.Generator().manual_seed(rank)
    ids = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(bs)]).int()
    scales = torch.randn(1 + experts, h, generator=torch.Generator().manual_seed(-1))
    return Sample(
        torch.randn(bs, h, generator=g).bfloat16(), ids, torch.randn(bs, k, generator=g), scales
    )


def worst_error(told: Sample, out: torch.Tensor, shared: int) -> float:
    """The largest error of out [BS, H], in units of what rounding may do; at most 1 is right. With s the scales of the
    expert, out[t] = the sum over all copies of token t of weight * round(127 x[t] s / max |x[t] s|): the examples' experts
    hand the int8 rows back without their scales."""
    rows = torch.cat([torch.zeros(len(told.x), shared, dtype=torch.long), 1 + told.expert_ids.long()], 1)
    weights = torch.cat([torch.ones(len(told.x), shared), told.expert_scales], 1).double()[..., None]
    v = told.x.double()[:, None] * told.scales.double()[rows]
    q = 127 * v / v.abs().amax(-1, keepdim=True)
    tie = ((q.abs() - q.trunc().abs()) - 0.5).abs() < 1e-4  # f32 may round it the other way
    want = (weights * q.round()).sum(1)
    allowed = (weights.abs() * torch.where(tie, 1.0, 1e-4)).sum(1) + want.abs() / 256  # half of the last of bf16's 8 bits
    return float(((out.double() - want).abs() / allowed).max())


def run_ranks(ranks: int, main: Callable[[int], Any]) -> list[Any]:
    """What main(rank) returns on each rank, a process with a gloo process group. Ends the program where one fails."""
    context = mp.get_context("fork")  # PyTorch is imported once
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        children = [context.Process(target=_rank, args=(rank, ranks, folder, main, results)) for rank in range(ranks)]
        for child in children:
            child.start()
        returned = dict(results.get() for _ in children)
        for child in children:
            child.join()
    if any(result is None for result in returned.values()):
        sys.exit(1)
    return [returned[rank] for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: str, main: Callable[[int], Any], results: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    result = None
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        result = main(rank)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
    results.put((rank, result))
    os._exit(0)  # gloo's threads may abort an interpreter that ends
