"""What a layer of the notebook is made of."""

from __future__ import annotations

import dataclasses
import math
from typing import Optional

import torch
from torch import Tensor

from ..errors import BadArgument


@dataclasses.dataclass
class MoEConfig:
    """
    num_experts         : E, over all ranks, of which each holds as many
    experts_per_token   : K
    hidden_dim          : H, of tokens and of what experts return
    max_num_tokens      : of a rank at the most, for the buffers of PyTorchAllToAll
    in_dtype, out_dtype : of rows that travel to experts and of results; experts compute in float32
    capacity_factor     : an expert takes ceil(T K / E * factor) slots of a rank with T tokens
    capacity_per_expert : or it takes so many; neither: there is no bound
    """

    num_experts: int
    experts_per_token: int
    hidden_dim: int
    max_num_tokens: int
    in_dtype: torch.dtype = torch.float16
    out_dtype: torch.dtype = torch.float16
    capacity_factor: Optional[float] = None
    capacity_per_expert: Optional[int] = None

    def __post_init__(self) -> None:
        """Raises BadArgument (both bounds, or one that is not above 0)."""
        bounds = [b for b in (self.capacity_factor, self.capacity_per_expert) if b is not None]
        if len(bounds) > 1 or any(b <= 0 for b in bounds):
            raise BadArgument(f"capacity is bounded by {bounds}, should be by one number above 0, or None")

    def capacity(self, tokens: int) -> Optional[int]:
        """Slots that an expert takes of a rank with so many tokens; None: all."""
        if self.capacity_factor is None:
            return self.capacity_per_expert
        return math.ceil(tokens * self.experts_per_token / self.num_experts * self.capacity_factor)


def keep_within(capacity: Optional[int], indices: Tensor) -> Tensor:
    """``indices`` [T, K], where each expert keeps its first ``capacity`` slots, token by token and best first; else -1.

    Not collective: each rank bounds its own.
    """
    if capacity is None:
        return indices
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    experts = flat[order]
    before = torch.arange(len(flat), device=flat.device) - torch.searchsorted(experts, experts)
    return flat.index_copy(0, order, experts.where(before < capacity, -1)).view_as(indices)
