"""Expert parallelism as one writes it with PyTorch alone: all_to_all_single of gloo around grouped_mm.

Rows are sorted by expert, counts and then rows exchanged, sorted by expert again where they arrive, multiplied in
groups, and brought back the same way.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .peer import Peer, Trained
from .task import RANKS, Gradients, Task, Weights, seen, scores_of


def available(task: Task) -> str:
    if not dist.is_available() or not dist.is_gloo_available():
        return "this PyTorch was built without gloo"
    if not hasattr(F, "grouped_mm"):
        return f"PyTorch {torch.__version__} has no grouped_mm: 2.10 has"
    return ""


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, out_splits: list[int], in_splits: list[int]) -> Tensor:
        ctx.splits = in_splits, out_splits
        arrived = rows.new_empty(sum(out_splits), rows.shape[1])
        dist.all_to_all_single(arrived, rows.contiguous(), out_splits, in_splits)
        return arrived

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(gradient, *ctx.splits), None, None


class GlooLayer(Trained):
    def __init__(self, task: Task, weights: Weights, rank: int) -> None:
        mine = weights.of_rank(rank, RANKS)
        if task.adamw:
            mine = mine.clone()
        self.local = mine.up.shape[0]
        for name, value in vars(mine).items():
            setattr(mine, name, None if value is None else nn.Parameter(value))
        self.w = mine
        super().__init__(task, [p for p in vars(mine).values() if p is not None])

    def _experts(self, rows: Tensor, of: Tensor, counts: Tensor) -> Tensor:
        """rows [R, H] by expert, the expert of each, and how many each has."""
        w, ends = self.w, counts.cumsum(0).to(torch.int32)
        h = F.grouped_mm(rows, w.up.transpose(1, 2), offs=ends)
        if self.task.gated:
            gate, up = h.chunk(2, -1)
            h = F.silu(gate) * up
        else:
            h = F.gelu(h + w.up_bias[of])
        y = F.grouped_mm(h, w.down.transpose(1, 2), offs=ends)
        return y if w.down_bias is None else y + w.down_bias[of]

    def _layer(self, x: Tensor) -> Tensor:
        weights, ids = scores_of(self.task, self.w, x)
        order = ids.flatten().argsort()
        sent = torch.bincount(ids.flatten(), minlength=self.task.experts)
        arrived = torch.empty_like(sent)
        dist.all_to_all_single(arrived, sent)
        arrived = arrived.view(RANKS, self.local)  # from each rank, of each expert here
        out_splits, in_splits = arrived.sum(1).tolist(), sent.view(RANKS, self.local).sum(1).tolist()

        rows = x[order // self.task.topk]
        rows = _Exchange.apply(rows, out_splits, in_splits)
        of = torch.arange(self.local).repeat(RANKS).repeat_interleave(arrived.flatten())
        of, by_expert = of.sort(stable=True)
        y = self._experts(rows[by_expert], of, arrived.sum(0))
        y = y[_inverse(by_expert)]
        y = _Exchange.apply(y, in_splits, out_splits)
        slots = y[_inverse(order)].view(*ids.shape, -1)
        return (slots * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._layer(x)

    def train_forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self._layer(x), None

    def share_gradients(self) -> None:
        for p in (self.w.router, self.w.router_bias):
            if p is not None:
                dist.all_reduce(p.grad)

    def gradients(self) -> Gradients:
        router = self.w.router.grad / (RANKS if self.optimizer else 1)
        return Gradients(self.dx, seen(self.w.up.grad), seen(self.w.down.grad), router)


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return inverse


PEER = Peer("gloo", RANKS, available, GlooLayer)
