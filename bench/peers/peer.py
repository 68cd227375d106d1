"""What every peer is to the program that compares them."""

from __future__ import annotations

import dataclasses
from typing import Callable, Iterable, Optional

import torch
from torch import Tensor, nn

from .task import RANKS, Gradients, Task, Weights

LEARNING_RATE = 1e-12  # the optimizer does all its work, and the weights stay what they are


class Layer:
    """A layer in one process: of RANKS ranks, or alone with as many threads. All methods are collective."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] of this rank's tokens, for inference."""
        raise NotImplementedError

    def step(self, x: Tensor, dout: Tensor) -> None:
        """Forward and backward, the gradient of x included; then the optimizer, where the task has one."""
        raise NotImplementedError

    def gradients(self) -> Gradients:
        """Of the last step."""
        raise NotImplementedError

    def forget(self) -> None:
        """Frees the gradients."""
        raise NotImplementedError


class Trained(Layer):
    """A step of training as anyone writes it in PyTorch."""

    def __init__(self, task: Task, parameters: Iterable[nn.Parameter], fused: bool = True) -> None:
        self.task = task
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=fused) if task.adamw else None
        self.dx: Optional[Tensor] = None

    def train_forward(self, x: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """out and the balancing loss, if there is one."""
        raise NotImplementedError

    def share_gradients(self) -> None:
        """Before the optimizer, of what all ranks hold; for those that have no hooks that do."""

    def step(self, x: Tensor, dout: Tensor) -> None:
        self.forget()
        x = x.detach().requires_grad_()
        out, loss = self.train_forward(x)
        if loss is None:
            out.backward(dout)
        else:  # is computed and counts nothing: everyone has another
            torch.autograd.backward([out, loss], [dout, torch.zeros_like(loss)])
        self.dx = x.grad
        if self.optimizer is not None:
            self.share_gradients()
            self.optimizer.step()

    def forget(self) -> None:
        self.dx = None
        for p in self.parameters:
            p.grad = None


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to run the layer.

    name      : in the JSON
    ranks     : processes, RANKS or one
    available : why it cannot run a task here, "" where it can
    build     : (task, weights of all experts, rank) -> the layer; where there are RANKS processes torch.distributed is
                initialised with gloo. Weights may be used where they lie unless the task has an optimizer
    """

    name: str
    ranks: int
    available: Callable[[Task], str]
    build: Callable[[Task, Weights, int], Layer]

    @property
    def threads(self) -> int:
        return RANKS // self.ranks
