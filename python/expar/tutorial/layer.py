"""The notebook's expert-parallel layer: its gate in PyTorch, its experts those of the library."""

from __future__ import annotations

from typing import Any, Mapping, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import expar.torch as ep
from expar.torch.ranks import first_of

from .all2all import PyTorchAllToAll
from .config import MoEConfig, keep_within

_PAYLOADS = {torch.float32: None, torch.bfloat16: "bf16", torch.float16: "f16"}


class Experts(nn.Module):
    """This rank's experts, Linear(H, F), GELU, Linear(F, H) each, as four stacked parameters.

    up [L, F, H], up_bias [L, F], down [L, H, F], down_bias [L, H]. A state dict has them one by one under the names of
    the notebook's ModuleList, "0.net.0.weight" and so on. Drawn as nn.Linear draws, in the notebook's order.
    """

    expert_shard: ep.ExpertShard
    # What an expert of the notebook calls them.
    _NAMES = {"up": "net.0.weight", "up_bias": "net.0.bias", "down": "net.2.weight", "down_bias": "net.2.bias"}

    def __init__(self, count: int, hidden: int, inner: int, shard: ep.ExpertShard) -> None:
        super().__init__()
        self.expert_shard = shard
        self.up = nn.Parameter(torch.empty(count, inner, hidden))
        self.up_bias = nn.Parameter(torch.empty(count, inner))
        self.down = nn.Parameter(torch.empty(count, hidden, inner))
        self.down_bias = nn.Parameter(torch.empty(count, hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for matrices in zip(self.up, self.up_bias, self.down, self.down_bias):
            for p, inputs in zip(matrices, (self.up.shape[2],) * 2 + (self.down.shape[2],) * 2):
                p.uniform_(-(inputs**-0.5), inputs**-0.5)

    def __len__(self) -> int:
        return len(self.up)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for e in range(len(self)):
            for name, theirs in self._NAMES.items():
                p = getattr(self, name)[e]
                destination[f"{prefix}{e}.{theirs}"] = p if keep_vars else p.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name, theirs in self._NAMES.items():
            keys = [f"{prefix}{e}.{theirs}" for e in range(len(self))]
            if all(key in state_dict for key in keys):
                state_dict[prefix + name] = torch.stack([state_dict.pop(key) for key in keys])
        super()._load_from_state_dict(state_dict, prefix, *args)


class EPMoE(nn.Module):
    """For each token the sum of its K likeliest experts' results, each times its probability; E / P experts per rank.

    gate    : nn.Linear(H, E), alike on every rank; ``model.gate = DDP(model.gate)`` keeps it so
    experts : Experts of this rank, from number rank * E / P on
    Probabilities are a softmax over all experts, not normalised again over the K. With a capacity the output is x plus
    the results of the slots that were kept: a token whose slots were all dropped is passed on as it is.

    Gradients of experts are of the sum of all ranks' losses, those of the gate of this rank's, which DDP averages;
    ``expar.torch.distributed_data_parallel`` and ``average_gradients`` make both those of the mean.
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
        x       : [T, H], any T, which may differ per rank
        returns : out [T, H] of out_dtype, and the auxiliary loss of this rank's tokens [], 0 in eval mode
        Differentiable in x and all parameters. Collective, backward too. Raises as expar.torch.visit_experts.
        """
        cfg, e = self.cfg, self.experts
        probs = F.softmax(self.gate(x.float()), dim=-1)
        weights, indices = probs.topk(cfg.experts_per_token)
        aux_loss = self._aux_loss(probs, indices) if self.training else probs.new_zeros(())
        capacity = cfg.capacity(len(x))
        out = ep.visit_experts(
            x.to(cfg.in_dtype).float(),
            keep_within(capacity, indices),
            weights,
            *(e.up, e.down, e.up_bias, e.down_bias),
            context=self.ata.context,
            experts=cfg.num_experts,
            activation="gelu",
            payload=_PAYLOADS[cfg.in_dtype],
        )
        if capacity is not None:
            out = out + x
        return out.to(cfg.out_dtype), aux_loss
