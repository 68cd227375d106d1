"""DeepSpeed's MoE on gloo: no token is dropped, so that it computes what the others do."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .peer import Peer, Trained
from .task import RANKS, Gradients, Task, Weights, seen


def available(task: Task) -> str:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed.moe.layer  # noqa: F401
    except ImportError as error:
        return f"{error}: pip install deepspeed"
    if not task.gated or task.bias or not task.renormalise:
        return "its router has no bias and divides the chosen scores by their sum"
    return ""


class SwiGlu(nn.Module):
    """One expert."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 2 * inner, bias=False, dtype=dtype)
        self.down = nn.Linear(inner, hidden, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class DeepSpeedLayer(Trained):
    def __init__(self, task: Task, weights: Weights, rank: int) -> None:
        import deepspeed
        from deepspeed.moe.layer import MoE

        deepspeed.init_distributed("gloo", verbose=False)
        with torch.device("meta"):
            self.moe = MoE(
                task.hidden,
                SwiGlu(task.hidden, task.inner, task.torch_dtype),
                num_experts=task.experts,
                ep_size=RANKS,
                k=task.topk,
                drop_tokens=False,
                top2_2nd_expert_sampling=False,
            )
        self.moe.set_deepspeed_parallelism()
        mine = weights.of_rank(rank, RANKS)
        if task.adamw:
            mine = mine.clone()
        self.moe.deepspeed_moe.gate.wg.weight = nn.Parameter(mine.router)
        self.experts = self.moe.deepspeed_moe.experts.deepspeed_experts
        for expert, up, down in zip(self.experts, mine.up, mine.down):
            expert.up.weight, expert.down.weight = nn.Parameter(up), nn.Parameter(down)
        super().__init__(task, self.moe.parameters())

    def forward(self, x: Tensor) -> Tensor:
        self.moe.eval()
        with torch.no_grad():
            return self.moe(x)[0]

    def train_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.moe.train()
        out, loss, _ = self.moe(x)
        return out, loss

    def gradients(self) -> Gradients:
        up, down = (seen(getattr(e, name).weight.grad for e in self.experts) for name in ("up", "down"))
        return Gradients(self.dx, up, down, self.moe.deepspeed_moe.gate.wg.weight.grad)


PEER = Peer("deepspeed", RANKS, available, DeepSpeedLayer)
