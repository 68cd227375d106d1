"""from_pretrained where each rank reads its own experts and no others.

transformers makes the model without memory, then asks the checkpoint for its tensors one by one. Between the two the
experts are sliced, and the tensors are narrowed to the slice: what belongs to other ranks is never asked for.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import Any, Iterator, Optional

from torch import nn
from transformers import PreTrainedModel, modeling_utils
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)

from ..errors import BadArgument, Unsupported
from ..torch.shards import Where
from .experts import find_experts, local_experts, weight_names
from .model import enable
from .replaced import replaced


def from_pretrained(model_class: Any, name: Any, *args: Any, context: Where = None, **kwargs: Any) -> Any:
    """enable(model_class.from_pretrained(name, *args, **kwargs), context), where no rank reads or holds others' experts.

    model_class : AutoModelForCausalLM, Qwen3MoeForCausalLM, ...
    name        : a directory or a name on the hub; safetensors in one file or many, or .bin
    context     : as for enable
    Collective as enable is. One thread of a process at a time.
    Raises BadArgument (a checkpoint with more or fewer experts than the model, on all ranks that load it), Unsupported
    (a way of loading that shows its checkpoint to nobody, as DeepSpeed's), and as enable and model_class.from_pretrained.
    Cost: memory of the dense parameters and of E / P experts, one layer's of them twice while it is put together.
    """
    with _enabled_on_the_way(context) as seen:
        model = model_class.from_pretrained(name, *args, **kwargs)
    if not seen:
        raise Unsupported(
            "transformers has loaded this checkpoint in a way of its own: use plain "
            f"{getattr(model_class, '__name__', model_class)}.from_pretrained, then expar.transformers.enable"
        )
    return model


@contextlib.contextmanager
def _enabled_on_the_way(context: Where) -> Iterator[list[nn.Module]]:
    """While inside, transformers enables models before it fills them. Yields those that it has."""
    seen: list[nn.Module] = []

    def fill_slices(model: PreTrainedModel, state_dict: dict[str, Any], load_config: Any, **kwargs: Any) -> Any:
        seen.append(enable(model, context))
        mine = _narrowed(model, state_dict, load_config.weight_mapping or [])
        return convert_and_load_state_dict_in_model(model, mine, load_config, **kwargs)

    with replaced(modeling_utils, "convert_and_load_state_dict_in_model", fill_slices):
        yield seen


def _narrowed(model: PreTrainedModel, checkpoint: dict[str, Any], conversions: list[Any]) -> dict[str, Any]:
    """Of ``checkpoint``, tensors by name, what this rank needs."""
    experts: dict[str, Any] = {
        f"{prefix}.{name}": module for prefix, module in find_experts(model) for name in weight_names(module)
    }
    parameters = model.state_dict()
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    found: defaultdict[tuple[str, Optional[str]], dict[int, str]] = defaultdict(dict)
    mine = {}
    # In transformers' order: what some of its renamings do depends on the names before.
    for key in sorted(checkpoint, key=dot_natural_key):
        tensor = checkpoint[key]
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if target in experts:
            module = experts[target]
            first, count = local_experts(module.num_experts, module.expar.context)
            if len(_shape(tensor)) == parameters[target].ndim - 1:  # one expert's
                _, expert, _ = _around_expert(key)
                found[target, pattern][expert] = key
                if not first <= expert < first + count:
                    continue
            else:
                tensor = _rows(key, tensor, first, count, module.num_experts)
        mine[key] = tensor
    for (target, _), names in found.items():
        _check_experts(names, experts[target].num_experts)
    return mine


def _around_expert(key: str) -> tuple[str, int, str]:
    """The number of the expert in the name of its tensor, and what is before and after it."""
    parts = key.split(".")
    place = max(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:place]), int(parts[place]), ".".join(parts[place + 1 :])


def _check_experts(names: dict[int, str], experts: int) -> None:
    """transformers stacks what is there, in whose place it may be. So each rank looks at all names, also of others."""
    before, _, after = _around_expert(next(iter(names.values())))
    wrong = min(set(names) ^ set(range(experts)), default=None)
    if wrong is not None:
        verb = "has" if wrong in names else "lacks"
        raise BadArgument(f"the checkpoint {verb} {before}.{wrong}.{after}: the model has experts 0 to {experts - 1}")


def _shape(tensor: Any) -> list[int]:
    """Of a tensor, or of a safetensors slice that is not read yet."""
    return list(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)


def _rows(key: str, tensor: Any, first: int, count: int, experts: int) -> Any:
    if _shape(tensor)[0] != experts:
        raise BadArgument(f"{key} in the checkpoint is {_shape(tensor)}, should hold {experts} experts along its rows")
    return _Rows(tensor, first, count) if hasattr(tensor, "get_shape") else tensor[first : first + count]


class _Rows:
    """Some rows of a safetensors slice, read when transformers indexes it."""

    def __init__(self, whole: Any, first: int, count: int) -> None:
        self._whole, self._rows = whole, slice(first, first + count)
        self.get_dtype = whole.get_dtype

    def get_shape(self) -> list[int]:
        return [self._rows.stop - self._rows.start, *_shape(self._whole)[1:]]

    def __getitem__(self, index: Any) -> Any:
        return self._whole[self._rows][index]
