"""This rank's experts, modules of their own whose parameters lie side by side, so that the library sees one stack."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

import expar.torch as ep
from expar.torch.visit import Visit

from .. import Context


class Expert(nn.Module):
    """net = Linear(input, hidden), GELU, Linear(hidden, output)."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, output_dim))

    def forward(self, x: Tensor) -> Tensor:
        """The expert's result [..., output] alone. Not collective."""
        return self.net(x)  # type: ignore[no-any-return]


class Experts(nn.ModuleList):
    """L experts. What gives them other memory (``to``, ``load_state_dict(assign=True)``) costs a copy per pass."""

    def __init__(self, count: int, hidden: int, inner: int, shard: ep.ExpertShard) -> None:
        super().__init__(Expert(hidden, inner, hidden) for _ in range(count))
        self.expert_shard = shard
        for parameters in self._by_kind():
            for p, row in zip(parameters, torch.stack([p.detach() for p in parameters])):
                p.data = row

    def _by_kind(self) -> list[tuple[nn.Parameter, ...]]:
        """The L up, down, up_bias and down_bias."""
        nets: list[Any] = [expert.net for expert in self]
        layers = [(net[0], net[2]) for net in nets]
        return [
            tuple(up.weight for up, _ in layers),
            tuple(down.weight for _, down in layers),
            tuple(up.bias for up, _ in layers),
            tuple(down.bias for _, down in layers),
        ]

    def visit(
        self, x: Tensor, ids: Tensor, weights: Tensor, context: Context, experts: int, payload: Optional[str]
    ) -> Tensor:
        """As expar.torch.visit_experts. An expert that no token has met gets no gradient, as if it was not called.

        x asks for a gradient on all ranks or none.
        """
        kinds = self._by_kind()
        parameters = [p for kind in kinds for p in kind]
        return _Visit.apply(x, ids, weights, context, experts, payload, len(self), *parameters)  # type: ignore


def _stacked(parameters: tuple[Tensor, ...]) -> Tensor:
    """[L, ...] float32, the parameters' own memory where they lie side by side."""
    first = parameters[0]
    size, begin, storage = first.numel(), first.storage_offset(), first.untyped_storage().data_ptr()
    if all(
        p.dtype == torch.float32
        and p.is_contiguous()
        and p.untyped_storage().data_ptr() == storage
        and p.storage_offset() == begin + i * size
        for i, p in enumerate(parameters)
    ):
        return first.detach().as_strided((len(parameters), *first.shape), (size, *first.stride()), begin)
    return torch.stack([p.detach().float() for p in parameters])


class _Visit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        context: Context,
        experts: int,
        payload: Optional[str],
        count: int,
        *parameters: Tensor,
    ) -> Tensor:
        up, down, up_bias, down_bias = (_stacked(parameters[i * count : (i + 1) * count]) for i in range(4))
        ctx.stacks = (up, down, up_bias, down_bias)
        out, ctx.visit = Visit.forward(context, x, ids, weights, ctx.stacks, experts, "gelu", payload=payload)
        ctx.save_for_backward(x, weights, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        weights = ctx.saved_tensors[1]
        dx, (dweights, *stacks) = ctx.visit.backward(dout, weights, ctx.stacks, ctx.needs_input_grad[0])
        rows = ctx.visit.plan.rows
        gradients = (g if n > 0 else None for stack in stacks for g, n in zip(stack.unbind(), rows))
        return dx, None, dweights, None, None, None, None, *gradients
