"""What a module with experts computes once it is expert-parallel: tokens travel to their experts and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from .. import Context
from ..errors import BadArgument
from ..torch import activate, combine, dispatch, grouped_mm, visit_experts
from ..torch.agree import told_to_all
from ..torch.ops import DTYPES
from .experts import is_transposed, weight_names

# transformers' activations in a gate, and alone, by the names of expar's kernels.
GATED = {
    "SiLU": "swiglu",
    "SiLUActivation": "swiglu",
    "GELUActivation": "geglu",
    "QuickGELUActivation": "quick_geglu",
}
PLAIN = {"SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "ReLUSquaredActivation": "relu2"}

# Of torch's elementwise kernels: elements of two of the widest vectors, bf16 in AVX-512; at::internal::GRAIN_SIZE.
LANES, GRAIN = 64, 32768


@dataclass(frozen=True)
class Enabled:
    """``module.expar``: how a module with experts is computed."""

    name: str  # of the module in its model
    context: Context
    weights: list[str]  # the parameters' names, as weight_names() has them
    transposed: bool
    activation: str  # expar's kernel; "": the module's own
    visits: bool  # weights lie as the library's own experts have them

    def __deepcopy__(self, memo: dict[int, object]) -> Enabled:
        return self  # copies of a model live on the same ranks


def enabled(name: str, module: nn.Module, context: Context) -> Enabled:
    """How ``module``, ``name`` in its model, is to be computed on the ranks of ``context``."""
    transposed, activation = is_transposed(module), _kernel_of(module)
    visits = activation != "" and not transposed and getattr(module, "is_concatenated", True)
    return Enabled(name, context, weight_names(module), transposed, activation, visits)


def _kernel_of(module: nn.Module) -> str:
    act_fn = type(getattr(module, "act_fn", None)).__name__
    if not getattr(module, "has_gate", True):
        return PLAIN.get(act_fn, "")
    if getattr(type(module), "_apply_gate", _default_apply_gate) is _default_apply_gate:
        return GATED.get(act_fn, "")
    if type(module).__name__ == "GptOssExperts" and not getattr(module, "is_concatenated", True):
        numbers = [getattr(module, name) for name in ("alpha", "limit")]
        return "clamped_swiglu" if numbers == [1.702, 7] else ""
    return ""


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """out [T, H] = for each token the sum of its experts' results, by weight.

    self          : a module with experts that enable() has seen
    hidden_states : [T, H] this rank's tokens; T may differ per rank and be 0
    top_k_index   : [T, K] integers in [-1, E); -1 is not routed
    top_k_weights : [T, K]
    Summed in f32 in the order of slots, rounded once. Differentiable in the tokens, the weights and the experts.
    Collective, backward too: each rank makes the same number of passes. Raises as expar.torch.dispatch, the same on
    every rank (ids that are E, as in transformers' own expert parallelism, among them); BadArgument (a module that
    enable() has not seen; a dtype that expar does not compute with).
    """
    return travel(self, hidden_states, top_k_index, top_k_weights.float(), before=False)


def travel(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, *, before: bool) -> Tensor:
    """The same with weights [T, K] f32; ``before``: rows are multiplied by them before the experts."""
    way: Optional[Enabled] = getattr(module, "expar", None)
    if way is None:
        raise BadArgument(
            f"{type(module).__name__} is to run on expar, as its config says, but its model has not been enabled: call "
            "expar.transformers.enable(model), or give the model a config of its own"
        )
    experts: int = module.num_experts  # type: ignore[assignment]
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else getattr(module, "down_proj").dtype
    if dtype not in DTYPES:
        _refuse_dtype(module, way, dtype, autocast)
    context, rows = way.context, x.to(dtype)
    up, down, *biases = (getattr(module, name).to(dtype) for name in way.weights)
    if way.visits and not before:
        out = visit_experts(
            rows, ids, weights, up, down, *biases, context=context, experts=experts, activation=way.activation
        )
        return out.to(x.dtype)
    sent = dispatch(rows, ids, weights if before else None, context=context, experts=experts)
    rows = (sent.rows * sent.weights[:, None]).to(dtype) if before else sent.rows
    up_bias, down_bias = biases or (None, None)
    h = _act(module, way, _linear(way, rows, up, up_bias, sent.counts))
    y = _linear(way, h, down, down_bias, sent.counts)
    return combine(y, sent, None if before else weights).to(x.dtype)


def _refuse_dtype(module: nn.Module, way: Enabled, dtype: torch.dtype, autocast: bool) -> None:
    with told_to_all(way.context):
        raise BadArgument(
            f"{way.name} of {type(module).__name__} is to compute in {dtype}, expar computes in float32 or bfloat16: "
            + ("autocast to torch.bfloat16" if autocast else "call model.to(torch.bfloat16)")
        )


def _linear(way: Enabled, x: Tensor, w: Tensor, bias: Optional[Tensor], counts: Tensor) -> Tensor:
    y = grouped_mm(x, w, counts, context=way.context, transposed=way.transposed)
    if bias is None:
        return y
    # A product as well: its gradient is summed over an expert's rows in their order, in f32.
    return y + grouped_mm(x.new_ones(x.shape[0], 1), bias[:, :, None], counts, context=way.context)


def _act(module: nn.Module, way: Enabled, pre: Tensor) -> Tensor:
    if way.activation:
        if not getattr(module, "is_concatenated", True):
            pre = pre.view(len(pre), pre.shape[1] // 2, 2).transpose(1, 2).flatten(1)
        return activate(pre, way.activation, context=way.context)
    act = module._apply_gate if getattr(module, "has_gate", True) else module.act_fn
    more = _even_rows(*pre.shape) - len(pre)
    h: Tensor = act(torch.nn.functional.pad(pre, (0, 0, 0, more)) if more else pre)  # type: ignore[operator]
    return h[: len(pre)]


def _even_rows(rows: int, columns: int) -> int:
    """As many rows or more, of which torch computes each to the same bytes whatever their number.

    torch's elementwise kernels end on single elements, which they round otherwise, where a thread's part is no multiple
    of two vectors. Threads share what is larger than a grain, as many as there are grains, evenly.
    """
    threads = torch.get_num_threads()
    if _up(rows, LANES) * columns <= GRAIN or threads == 1:
        return _up(rows, LANES)
    narrowest = max(1, columns // 2)  # a gate's result
    return _up(max(rows, -(-threads * GRAIN // narrowest)), LANES * threads)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
