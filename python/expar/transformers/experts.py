"""The modules of transformers that hold experts: how their weights lie, and this rank's slice of them."""

from __future__ import annotations

from typing import Iterator

from torch import Tensor, nn

from .. import Context, experts_of
from ..errors import BadArgument

# What transformers' use_experts_implementation says of a module: these are set wherever it is used.
FLAGS = ("is_transposed", "has_bias")
# Experts that do not go through it; their weights are transposed.
APART = frozenset({"Llama4TextExperts"})


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in a way that this package knows."""
    return type(module).__name__ in APART or all(hasattr(module, flag) for flag in FLAGS)


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module with experts, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if is_experts(module))


def is_transposed(module: nn.Module) -> bool:
    """Whether a weight is [E, inputs, outputs]."""
    return type(module).__name__ in APART or bool(getattr(module, "is_transposed"))


def weight_names(module: nn.Module) -> list[str]:
    """What the parameters of experts are called: up, down, and, where there are any, the biases of both."""
    names = ["gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"]
    return names + [f"{name}_bias" for name in names] if getattr(module, "has_bias", False) else names


def local_experts(num_experts: int, context: Context) -> tuple[int, int]:
    """(first, count) of the experts that a rank of ``context`` holds; the count may be 0. Not collective."""
    return experts_of(context.rank, context.size, num_experts)


def slice_experts(module: nn.Module, context: Context) -> None:
    """Keeps of a module with experts those of this rank: parameters [E, ...] become [L, ...], in memory of their own.

    Parameters stay the same objects, so that an optimizer that has them goes on with them; gradients are dropped. What is
    this rank's slice already stays as it is. ``module.num_experts`` stays E. Not collective.
    Raises BadArgument (weights that are no experts, or of a dtype that expar does not compute with).
    """
    experts: int = module.num_experts  # type: ignore[assignment]
    first, count = local_experts(experts, context)
    wanted = weight_names(module)
    held = dict(module.named_parameters())
    for name in sorted(set(held) - set(wanted)):
        raise BadArgument(
            f"{type(module).__name__}.{name} belongs to no single expert, so that no rank can hold it alone: expar does "
            "not support this model"
        )
    for name in wanted:
        parameter = held.get(name)
        if parameter is None:
            raise BadArgument(f"{type(module).__name__} has no parameter {name}: expar does not support this model")
        if not parameter.is_floating_point() or parameter.element_size() < 2 or str(parameter.dtype) == "torch.float16":
            raise BadArgument(
                f"{type(module).__name__}.{name} is {parameter.dtype}, expar computes in float32 or bfloat16: load the "
                "model with dtype=torch.bfloat16, without quantization"
            )
        if parameter.shape[0] not in (experts, count):
            raise BadArgument(
                f"{type(module).__name__}.{name} is {list(parameter.shape)}: should hold all {experts} experts, or the "
                f"{count} of rank {context.rank} of {context.size}"
            )
    for name in wanted:
        if held[name].shape[0] != count:
            held[name].data = _part(held[name], first, count)
            held[name].grad = None


def _part(whole: Tensor, first: int, count: int) -> Tensor:
    return whole.detach()[first : first + count].clone()
