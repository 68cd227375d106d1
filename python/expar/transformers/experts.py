"""The modules of transformers that hold experts: how their weights lie, and this rank's slice of them."""

from __future__ import annotations

from typing import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import Context, experts_of
from ..errors import BadArgument
from ..torch.ops import DTYPES

# What transformers' use_experts_implementation says of a module: these are set wherever it is used.
FLAGS = ("is_transposed", "has_bias")
# Experts that do not go through it; their weights are transposed.
APART = frozenset({"Llama4TextExperts"})


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in a way that this package knows."""
    return _is_apart(module) or all(hasattr(module, flag) for flag in FLAGS)


def _is_apart(module: nn.Module) -> bool:
    # A parametrized module is of a class derived from its own.
    return any(base.__name__ in APART for base in type(module).__mro__)


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module with experts, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if is_experts(module))


def is_transposed(module: nn.Module) -> bool:
    """Whether a weight is [E, inputs, outputs]."""
    return _is_apart(module) or bool(getattr(module, "is_transposed"))


def weight_names(module: nn.Module) -> list[str]:
    """What the parameters of experts are called: up, down, and, where there are any, the biases of both."""
    names = ["gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"]
    return names + [f"{name}_bias" for name in names] if getattr(module, "has_bias", False) else names


def local_experts(num_experts: int, context: Context) -> tuple[int, int]:
    """(first, count) of the experts that a rank of ``context`` holds; the count may be 0. Not collective."""
    return experts_of(context.rank, context.size, num_experts)


def slice_experts(module: nn.Module, context: Context, where: str = "") -> None:
    """Keeps of a module with experts those of this rank: parameters [E, ...] become [L, ...], in memory of their own.

    Parameters stay the same objects, so that an optimizer made before goes on with them, unless it has stepped: its
    state is of all experts still. Gradients are dropped. What is this rank's slice already stays as it is.
    ``module.num_experts`` stays E. Not collective. Raises as check_experts.
    """
    check_experts(module, context, where)
    first, count = local_experts(module.num_experts, context)  # type: ignore[arg-type]
    for name in weight_names(module):
        parameter = getattr(module, name)
        if parameter.shape[0] != count:
            parameter.data = _part(parameter, first, count)
            parameter.grad = None


def check_experts(module: nn.Module, context: Context, where: str = "") -> None:
    """Raises BadArgument, naming ``where`` the module is: weights that are no experts, or of a dtype that expar does not
    compute with. Not collective."""
    experts: int = module.num_experts  # type: ignore[assignment]
    first, count = local_experts(experts, context)
    wanted = weight_names(module)
    held = dict(module.named_parameters())

    def refuse(name: str, why: str) -> None:
        raise BadArgument(f"{'.'.join(filter(None, (where, name)))} of {type(module).__name__} {why}")

    for name in sorted(set(held) - set(wanted)):
        refuse(name, "belongs to no single expert, so no rank can hold it alone: expar does not support this model")
    for name in wanted:
        if name not in held:
            refuse(name, "is missing: expar does not support this model")
        parameter = held[name]
        if isinstance(parameter, DTensor):
            refuse(name, "is sharded already: enable the model before fully_shard or any other parallelism")
        if parameter.device.type not in ("cpu", "meta"):
            refuse(name, f"is on '{parameter.device}', expar computes on the CPU: load the model with device_map='cpu'")
        if parameter.dtype not in DTYPES:
            refuse(name, f"is {parameter.dtype}, expar computes in float32 or bfloat16: load with dtype=torch.bfloat16")
        if parameter.shape[0] not in (experts, count):
            refuse(
                name,
                f"is {list(parameter.shape)}, should hold all {experts} experts, or the {count} of rank {context.rank} "
                f"of {context.size}",
            )


def _part(whole: Tensor, first: int, count: int) -> Tensor:
    return whole.detach()[first : first + count].clone()
