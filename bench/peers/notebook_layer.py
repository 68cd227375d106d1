"""The EPMoE of a notebook that the user names: its own code, read from the file and run as it is."""

from __future__ import annotations

import functools
import json
import pathlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from .peer import Peer, Trained
from .task import RANKS, Gradients, Task, Weights, seen

CLASSES = ("MoEConfig", "PyTorchAllToAll", "EPMoE")
_BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _cells(path: pathlib.Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".ipynb":
        return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return _BLOCK.findall(text)


def classes(path: str) -> dict[str, Any]:
    """What those cells define that define one of CLASSES. Raises ValueError where one is missing."""
    wanted = re.compile(rf"^class ({'|'.join(CLASSES)})\b", re.MULTILINE)
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in _cells(pathlib.Path(path)):
        if wanted.search(cell):
            exec(compile(cell, path, "exec", dont_inherit=True), names)
    missing = [name for name in CLASSES if name not in names]
    if missing:
        raise ValueError(f"{path} has no cell with class {missing[0]}")
    return names


def available(path: str, task: Task) -> str:
    if not path:
        return "name its file: --notebook FILE, .ipynb or .md"
    if task.gated or not task.bias or task.renormalise or task.inner != 4 * task.hidden:
        return "its experts are GELU with biases and F = 4 H, its weights the plain scores"
    try:
        classes(path)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


class Notebook(Trained):
    def __init__(self, path: str, task: Task, weights: Weights, rank: int) -> None:
        made = classes(path)
        config = made["MoEConfig"](
            num_experts=task.experts,
            experts_per_token=task.topk,
            hidden_dim=task.hidden,
            max_num_tokens=max(128, task.tokens),
            in_dtype=task.torch_dtype,
            out_dtype=task.torch_dtype,
        )
        self.model = made["EPMoE"](config, rank=rank, world_size=RANKS)
        mine = weights.of_rank(rank, RANKS)
        with torch.no_grad():
            self.model.gate.weight.copy_(mine.router)
            self.model.gate.bias.copy_(mine.router_bias)
            for e, expert in enumerate(self.model.experts):
                up, _, down = expert.net
                for to, values in (
                    (up.weight, mine.up),
                    (up.bias, mine.up_bias),
                    (down.weight, mine.down),
                    (down.bias, mine.down_bias),
                ):
                    to.copy_(values[e])
        # These two lines are its training loop's.
        self.model.gate = nn.parallel.DistributedDataParallel(self.model.gate)
        super().__init__(task, [*self.model.gate.parameters(), *self.model.experts.parameters()], fused=False)

    def forward(self, x: Tensor) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.model(x)[0]

    def train_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.model.train()
        return self.model(x)

    def gradients(self) -> Gradients:
        up, down = (seen(e.net[i].weight.grad for e in self.model.experts) for i in (0, 2))
        return Gradients(self.dx, up, down, self.model.gate.module.weight.grad)


def peer(path: str) -> Peer:
    return Peer("notebook", RANKS, functools.partial(available, path), functools.partial(Notebook, path))
