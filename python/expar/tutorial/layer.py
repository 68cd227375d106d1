"""The notebook's expert-parallel layer: its gate in PyTorch, its experts those of the library."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expar.torch as ep
from expar.torch.ranks import first_of

from .all2all import PyTorchAllToAll
from .config import MoEConfig, keep_within
from .experts import Experts

_PAYLOADS = {torch.float32: None, torch.bfloat16: "bf16", torch.float16: "f16"}


class EPMoE(nn.Module):
    """For each token the sum of its K likeliest experts' results, each times its probability; E / P experts per rank.

    gate    : nn.Linear(H, E), alike on every rank; ``model.gate = DDP(model.gate)`` keeps it so
    experts : Experts of this rank, from number rank * E / P on
    Probabilities are a softmax over all experts, not normalised again over the K. With a capacity the output is x plus
    the results of the slots that were kept: a token whose slots were all dropped is passed on as it is.

    Gradients of experts are of the sum of all ranks' losses, and None where no token came; those of the gate are of
    this rank's loss, which DDP averages. ``expar.torch.average_gradients`` makes both those of the mean.
    """

    def __init__(self, cfg: MoEConfig, rank: Optional[int] = None, world_size: Optional[int] = None) -> None:
        """rank, world_size: of torch.distributed, which is the default; a world of 1 is this process alone. Collective.

        Raises BadArgument (ranks that cannot hold as many experts each), and as expar.torch.context.
        """
        super().__init__()
        self.cfg = cfg
        self.ata = PyTorchAllToAll(cfg, rank, world_size)
        self.rank, self.world_size = self.ata.rank, self.ata.world_size
        self.gate: nn.Module = nn.Linear(cfg.hidden_dim, cfg.num_experts)
        self.num_local_experts = self.ata.num_local_experts
        shard = ep.ExpertShard(self.rank, self.world_size, replica=first_of(self.ata.context))
        self.experts = Experts(self.num_local_experts, cfg.hidden_dim, cfg.hidden_dim * 4, shard)

    def _aux_loss(self, probs: Tensor, indices: Tensor) -> Tensor:
        """var(sum of probs) / E^2 + E * sum over experts of the share of tokens that chose it times the mean of their
        probabilities for it, 0 for the others. Of this rank's tokens, before a capacity; 0 without any.

        probs [T, E]; indices [T, K]; returns [], differentiable in probs
        """
        experts, tokens = self.cfg.num_experts, max(len(probs), 1)
        chosen = torch.zeros_like(probs).scatter_(1, indices, 1.0)
        usage, routed = (rows.sum(0) / tokens for rows in (chosen, probs * chosen))
        return probs.sum(0).var() / experts**2 + experts * (usage * routed).sum()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        x       : [T, H], any T, which may differ per rank; with a gradient on all ranks or none
        returns : out [T, H] of out_dtype, and the auxiliary loss of this rank's tokens [], 0 in eval mode
        Differentiable in x and all parameters. Collective, backward too. Raises as expar.torch.visit_experts.
        """
        cfg = self.cfg
        probs = F.softmax(self.gate(x.float()), dim=-1)
        weights, indices = probs.topk(cfg.experts_per_token)
        aux_loss = self._aux_loss(probs, indices) if self.training else probs.new_zeros(())
        capacity = cfg.capacity(len(x))
        out = self.experts.visit(
            x.to(cfg.in_dtype).float(),
            keep_within(capacity, indices),
            weights,
            self.ata.context,
            cfg.num_experts,
            _PAYLOADS[cfg.in_dtype],
        )
        if capacity is not None:
            out = out + x
        return out.to(cfg.out_dtype), aux_loss
