"""Experts as one module of three stacked matrices, which the parallel styles slice."""

from __future__ import annotations

import functools
from typing import Optional

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import Context
from ..errors import BadArgument
from .activation import activate
from .ops import grouped_mm
from .ranks import alone
from .shards import local_of


class GroupedExperts(nn.Module):
    """E SwiGLU experts: w2 (silu(w1 x) * (w3 x)) for each row, by the weights of its expert.

    w1, w3 : [E, F, H] gate and up
    w2     : [E, H, F] down
    Without a style all E experts are this rank's, and nothing communicates. ``parallelize_module(experts, mesh,
    ExpertParallel())`` slices them; the call stays the same.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        context: Optional[Context] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        """dim: H; hidden_dim: F; num_experts: E; context: whose kernels and threads, None: this process's own."""
        super().__init__()
        self.num_experts = num_experts
        self.context = context
        for name, rows, columns in (("w1", hidden_dim, dim), ("w2", dim, hidden_dim), ("w3", hidden_dim, dim)):
            weights = torch.empty(num_experts, rows, columns, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weights))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, init_std: float = 0.02) -> None:
        """Draws w1 with deviation 0.02 and w2, w3 with ``init_std``, cut off at 2, from PyTorch's generator.

        Every rank draws all experts and keeps its own: where all ranks were seeded alike, the values are those of one
        process, however the experts are sliced. Not collective.
        """
        for name, std in (("w1", 0.02), ("w2", init_std), ("w3", init_std)):
            whole = getattr(self, name)
            if whole.is_meta:
                continue
            begins = _offset_of(whole)
            mine = local_of(whole)
            drawn = torch.empty(whole.shape[1:])
            for expert in range(whole.shape[0]):
                nn.init.trunc_normal_(drawn, std=std)
                if begins[0] <= expert < begins[0] + mine.shape[0]:
                    rows, columns = (slice(b, b + n) for b, n in zip(begins[1:], mine.shape[1:]))
                    mine[expert - begins[0]].copy_(drawn[rows, columns])

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """The experts' results, row by row.

        x                     : [N, H] of the parameters' dtype, rows sorted by expert
        num_tokens_per_expert : [E] integers whose sum is N; any may be 0, N too
        returns               : [N, H], in the rows' order, with a gradient function also where N is 0
        Differentiable in x and the weights. Collective under a style, alone not.
        Raises BadArgument (counts that do not fit the experts or the rows).
        """
        w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1, self.w2, self.w3))
        if num_tokens_per_expert.shape != w1.shape[:1]:
            raise BadArgument(
                f"num_tokens_per_expert is {list(num_tokens_per_expert.shape)} for {w1.shape[0]} experts"
            )
        context = self.context or alone()
        multiply = functools.partial(grouped_mm, counts=num_tokens_per_expert, context=context)
        h = activate(multiply(x, w1), "silu", context=context) * multiply(x, w3)
        return multiply(h, w2)

    def extra_repr(self) -> str:
        experts, inner, hidden = self.w1.shape
        return f"dim={hidden}, hidden_dim={inner}, num_experts={experts}"


def _offset_of(parameter: Tensor) -> tuple[int, ...]:
    """Where this rank's part begins in the whole parameter."""
    if not isinstance(parameter, DTensor):
        return (0,) * parameter.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(
        compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)[1]
    )
