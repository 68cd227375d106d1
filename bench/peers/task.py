"""What all peers compute: one MoE layer, its weights and its tokens, and what the outcome should be."""

from __future__ import annotations

import dataclasses
from typing import Iterable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# So many processes where there is expert parallelism; one process has as many threads.
RANKS = 2


@dataclasses.dataclass(frozen=True)
class Task:
    """A softmax router with K of E experts; gated ones with SiLU, or plain ones with GELU and biases."""

    tokens: int  # of each of RANKS ranks; one process has them all
    hidden: int
    inner: int
    experts: int
    topk: int
    dtype: str
    activation: str = "swiglu"
    bias: bool = False
    renormalise: bool = True  # the chosen scores are divided by their sum
    adamw: bool = False  # a step ends with an optimizer's

    @property
    def total(self) -> int:
        return RANKS * self.tokens

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"f32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def tolerance(self) -> float:
        """Relative error of a row. In bf16 results are rounded several times by 2^-9; a wrong expert is off by more."""
        return {"f32": 1e-4, "bf16": 0.03}[self.dtype]


@dataclasses.dataclass
class Weights:
    """Of the whole layer, or of some of its experts."""

    router: Tensor  # [E, H] f32
    up: Tensor  # [E, 2F, H], gate then up, or [E, F, H]
    down: Tensor  # [E, H, F]
    router_bias: Optional[Tensor] = None  # [E] f32
    up_bias: Optional[Tensor] = None  # [E, F] f32
    down_bias: Optional[Tensor] = None  # [E, H] f32

    def of_rank(self, rank: int, ranks: int) -> Weights:
        """Those of its experts: an even share, in order. No copies."""
        local = self.up.shape[0] // ranks
        mine = slice(rank * local, (rank + 1) * local)
        parts = (None if t is None else t[mine] for t in (self.up, self.down, self.up_bias, self.down_bias))
        up, down, up_bias, down_bias = parts
        return Weights(self.router, up, down, self.router_bias, up_bias, down_bias)

    def clone(self) -> Weights:
        return Weights(*(None if t is None else t.clone() for t in vars(self).values()))


@dataclasses.dataclass
class Gradients:
    """What a step leaves, of one rank's tokens and experts."""

    dx: Tensor  # [T, H]
    up: Tensor  # [E, VIEWS] f32, seen() of the gradients of each expert's matrix
    down: Tensor
    router: Tensor  # [E, H] f32; summed over the ranks it is the gradient of all tokens


VIEWS = 8


def seen(gradients: Iterable[Optional[Tensor]]) -> Tensor:
    """[E, VIEWS] f32: each [N, K] gradient as u G v for VIEWS random pairs of u and v; of none, zeros.

    An error of G shows in proportion, its sign and its place too, and nobody keeps whole gradients.
    """
    rows = []
    for gradient in gradients:
        if gradient is None:
            rows.append(torch.zeros(VIEWS))
            continue
        drawn = torch.Generator().manual_seed(4)
        u, v = (torch.randn(size, VIEWS, generator=drawn) for size in gradient.shape)
        rows.append((u * (gradient.float() @ v)).sum(0))
    return torch.stack(rows)


def scores_of(task: Task, w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the router makes of tokens, in f32: weights [T, K] and experts [T, K]."""
    scores = F.linear(x.float(), w.router, w.router_bias).softmax(-1)
    top, ids = scores.topk(task.topk, dim=-1)
    return top / top.sum(-1, keepdim=True) if task.renormalise else top, ids


def draw_weights(task: Task, seed: int) -> Weights:
    """Normal numbers of deviation 1 / sqrt(inputs), in memory that processes share."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        drawn = torch.empty(shape, dtype=dtype).share_memory_()
        return drawn.normal_(std=shape[-1] ** -0.5, generator=generator)

    e, h, f, dtype = task.experts, task.hidden, task.inner, task.torch_dtype
    weights = Weights(normal(e, h), normal(e, 2 * f if task.gated else f, h, dtype=dtype), normal(e, h, f, dtype=dtype))
    if task.bias:
        weights.router_bias, weights.up_bias, weights.down_bias = normal(e), normal(e, f), normal(e, h)
    return weights


def draw_tokens(task: Task, w: Weights, seed: int) -> tuple[Tensor, Tensor]:
    """x and the gradient of out, [total, H]. Tokens whose choice hangs on the rounding of a sum are left out."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2 * task.total + 64, task.hidden, generator=generator).to(task.torch_dtype)
    logits = F.linear(drawn.float(), w.router, w.router_bias)
    best = logits.topk(min(task.topk + 1, task.experts), dim=-1).values
    clear = (best[:, :-1] - best[:, 1:]).min(-1).values > 1e-4
    x = drawn[clear][: task.total].clone()
    dout = torch.randn(task.total, task.hidden, generator=generator).to(task.torch_dtype)
    return x.share_memory_(), dout.share_memory_()


def expected(task: Task, w: Weights, x: Tensor, dout: Tensor) -> tuple[Tensor, Gradients]:
    """out [total, H] and the gradients of sum(out * dout), expert by expert in f32."""
    w = dataclasses.replace(w, router=w.router.detach().requires_grad_())
    x, dout = x.float().requires_grad_(), dout.float()
    weights, ids = scores_of(task, w, x)
    out, dx, dweights = torch.zeros_like(dout), torch.zeros_like(dout), torch.zeros_like(weights)
    dup, ddown = torch.zeros(task.experts, VIEWS), torch.zeros(task.experts, VIEWS)
    for e in range(task.experts):
        tokens, slots = (ids == e).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        rows = x[tokens].detach().requires_grad_()
        up, down = (t[e].float().requires_grad_() for t in (w.up, w.down))
        h = F.linear(rows, up, None if w.up_bias is None else w.up_bias[e])
        h = F.silu(h[:, : task.inner]) * h[:, task.inner :] if task.gated else F.gelu(h)
        y = F.linear(h, down, None if w.down_bias is None else w.down_bias[e])
        weight = weights.detach()[tokens, slots, None]
        y.backward(weight * dout[tokens])
        y = y.detach()
        out.index_add_(0, tokens, weight * y)
        dweights[tokens, slots] = (y * dout[tokens]).sum(-1)
        dx.index_add_(0, tokens, rows.grad)
        dup[e], ddown[e] = seen([up.grad, down.grad])
    weights.backward(dweights)
    return out, Gradients(dx + x.grad, dup, ddown, w.router.grad)


def count_wrong(task: Task, got: Tensor, want: Tensor) -> int:
    """Rows (of a vector: elements) whose relative error is above the tolerance; NaN is wrong. In the router's gradient
    of an expert with few tokens, or none, large numbers cancel: rows count for a tenth of the largest at the least.
    """
    got, want = (t.float().reshape(t.shape[0], -1) for t in (got, want))
    norms_wanted = want.norm(dim=1)
    good = (got - want).norm(dim=1) <= task.tolerance * norms_wanted.clamp(min=0.1 * float(norms_wanted.max()))
    return int((~good).sum())
