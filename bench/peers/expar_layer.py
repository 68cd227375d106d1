"""expar's own layer: in one process, and on two ranks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .peer import Peer, Trained
from .task import RANKS, Gradients, Task, Weights, seen


def available(task: Task) -> str:
    try:
        import expar.torch  # noqa: F401
    except ImportError as error:
        return f"{error}: pip install . in the clone, or PYTHONPATH=build/release/python"
    return ""


class ExparLayer(Trained):
    def __init__(self, ranks: int, task: Task, weights: Weights, rank: int) -> None:
        import expar.torch as ep

        self.context = ep.context(threads=RANKS // ranks)
        mine = weights.of_rank(rank, ranks)
        self.packed = _make(task, mine, self.context).for_inference()
        self.layer = _make(task, mine.clone() if task.adamw else mine, self.context)
        self.ranks = ranks
        super().__init__(task, self.layer.parameters())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.packed(x)

    def train_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer.aux_loss

    def share_gradients(self) -> None:
        import expar

        if self.ranks == 1:
            return
        for p in self.layer.router.parameters():
            mine = p.grad.reshape(1, -1).clone()
            expar.all_reduce(self.context, mine, p.grad.view(-1))

    def gradients(self) -> Gradients:
        experts = self.layer.experts
        router = self.layer.router.weight.grad / (self.ranks if self.optimizer else 1)
        return Gradients(self.dx, seen(experts.up.grad), seen(experts.down.grad), router)


def _make(task: Task, mine: Weights, context) -> nn.Module:
    import expar
    import expar.torch as ep

    router = expar.router_preset("mixtral", task.experts, task.topk)
    router.renormalise, router.bias = task.renormalise, task.bias
    if task.adamw:
        router.balance = router.importance = 0.01  # as the notebook's
    with torch.device("meta"):
        layer = ep.MoELayer(
            task.hidden,
            task.inner,
            task.experts,
            task.topk,
            router=router,
            context=context,
            activation=task.activation,
            bias=task.bias,
            dtype=task.torch_dtype,
        )
    values = {
        "router.weight": mine.router,
        "router.bias": mine.router_bias,
        "experts.up": mine.up,
        "experts.down": mine.down,
        "experts.up_bias": mine.up_bias,
        "experts.down_bias": mine.down_bias,
    }
    for name, _ in list(layer.named_parameters()):
        part, _, own = name.partition(".")
        layer.get_submodule(part).register_parameter(own, nn.Parameter(values[name]))
    return layer


def _peer(ranks: int) -> Peer:
    name = f"expar_{ranks}_rank" + "s" * (ranks > 1)
    return Peer(name, ranks, available, functools.partial(ExparLayer, ranks))


ONE_RANK, ALL_RANKS = _peer(1), _peer(RANKS)
