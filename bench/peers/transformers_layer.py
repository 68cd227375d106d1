"""Qwen3-MoE's block of transformers in one process, with each of its two ways to run experts on a CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .peer import Peer, Trained
from .task import Gradients, Task, Weights, seen


def available(task: Task) -> str:
    try:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: F401
    except ImportError as error:
        return f"{error}: pip install transformers"
    if not task.gated or task.bias or task.adamw:
        return "Qwen3-MoE's experts are SwiGLU without biases"
    return ""


class QwenBlock(Trained):
    def __init__(self, experts: str, task: Task, weights: Weights, rank: int) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        config = Qwen3MoeConfig(
            hidden_size=task.hidden,
            moe_intermediate_size=task.inner,
            num_experts=task.experts,
            num_experts_per_tok=task.topk,
            norm_topk_prob=task.renormalise,
            hidden_act="silu",
        )
        config._experts_implementation = experts
        with torch.device("meta"):
            self.block = Qwen3MoeSparseMoeBlock(config)
        self.block.gate.weight = nn.Parameter(weights.router)
        self.block.experts.gate_up_proj = nn.Parameter(weights.up)
        self.block.experts.down_proj = nn.Parameter(weights.down)
        # Its logits are of the model's dtype; in f32 all peers choose the same experts.
        self.block.gate.register_forward_pre_hook(lambda gate, inputs: (inputs[0].float(),))
        super().__init__(task, self.block.parameters())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.block(x[None])[0]

    def train_forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.block(x[None])[0], None

    def gradients(self) -> Gradients:
        experts = self.block.experts
        return Gradients(
            self.dx, seen(experts.gate_up_proj.grad), seen(experts.down_proj.grad), self.block.gate.weight.grad
        )


def _peer(experts: str) -> Peer:
    return Peer(f"transformers_{experts}", 1, available, functools.partial(QwenBlock, experts))


EAGER, GROUPED_MM = _peer("eager"), _peer("grouped_mm")
