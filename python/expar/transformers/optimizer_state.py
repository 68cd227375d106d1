"""The state of an optimizer with all experts, as one process would have it, and this rank's part of that."""

from __future__ import annotations

from typing import Any, Callable

from torch import Tensor, nn

from .experts import find_experts, local_experts
from .saving import gather_rows, writer_of


def whole_state(optimizer: Any, model: nn.Module) -> dict[str, Any]:
    """optimizer.state_dict() where state that has a row for each expert has them all, on PyTorch's rank 0; elsewhere it
    is of no use.

    Collective over the ranks that share experts. Cost: rank 0 holds the state of all experts.
    """
    writer = writer_of(next(module for _, module in find_experts(model)))

    def whole(module: Any, tensor: Tensor) -> Tensor:
        return tensor if writer is None else gather_rows(module.expar.context, tensor, writer)

    def rows(module: Any) -> int:
        return local_experts(module.num_experts, module.expar.context)[1]

    return _with_rows(optimizer, model, optimizer.state_dict(), rows, whole)


def own_state(optimizer: Any, model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Of ``state``, which has all experts, what optimizer.load_state_dict takes on this rank. Not collective."""

    def own(module: Any, tensor: Tensor) -> Tensor:
        first, count = local_experts(module.num_experts, module.expar.context)
        return tensor[first : first + count].clone()

    return _with_rows(optimizer, model, state, lambda module: int(module.num_experts), own)


def _with_rows(
    optimizer: Any,
    model: nn.Module,
    state: dict[str, Any],
    rows: Callable[[Any], int],
    change: Callable[[Any, Tensor], Tensor],
) -> dict[str, Any]:
    """``state`` with what it has of expert parameters changed, as far as that has ``rows`` of the module."""
    modules = {id(parameter): module for _, module in find_experts(model) for parameter in module.parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    changed = dict(state["state"])
    for number, parameter in zip(numbers, parameters):
        module = modules.get(id(parameter))
        if module is not None and number in changed:
            had = changed[number].items()
            changed[number] = {
                name: change(module, value) if _has_rows(value, rows(module)) else value for name, value in had
            }
    return {**state, "state": changed}


def _has_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == count
