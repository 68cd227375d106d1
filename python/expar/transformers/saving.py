"""save_pretrained of a model whose experts are spread over ranks: the checkpoint that one process would write.

PyTorch's rank 0 writes. When it comes to the experts of a module it asks the ranks that it shares them with for theirs,
and forgets them again.
"""

from __future__ import annotations

import math
from types import MethodType
from typing import Any, Callable, Optional

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import modeling_utils
from transformers.core_model_loading import revert_weight_conversion

from .. import Context, all_gather, all_to_all_v, broadcast
from ..errors import Internal, Unsupported
from .experts import find_experts, weight_names
from .replaced import replaced
from .streamed import bytes_of, write_safetensors


def save_whole(model: Any) -> None:
    """From now on save_pretrained of a model that is enabled writes all experts, in Hugging Face's own format.

    It is then collective over the ranks that share them. Arguments are the same, and so are the files and tensors, as
    if one process had the whole model. Of all processes PyTorch's rank 0 writes, where its ``is_main_process`` is
    true. What is wrong is raised there as before, and on the ranks that share experts with it as Internal; Unsupported
    (distributed_checkpoint; experts that were MXFP4, unless save_original_format is False).
    Cost: the rank that writes holds all experts of one module at a time, beside its own.
    """
    model.save_pretrained = MethodType(_save_pretrained, model)


def saves_whole(model: Any) -> bool:
    """Whether its save_pretrained is collective."""
    return getattr(getattr(model, "save_pretrained", None), "__func__", None) is _save_pretrained


def writer_of(module: Any, is_main_process: bool = True) -> Optional[int]:
    """Which of the ranks that share these experts is PyTorch's rank 0. None: it is with a replica, or not main.

    Where PyTorch knows of no ranks, it is the first of the first replica. Collective over these ranks.
    """
    context, replica = module.expar.context, module.expert_shard.replica
    first = dist.get_rank() == 0 if dist.is_initialized() else context.rank == replica == 0
    told = torch.zeros(context.size, dtype=torch.int64)
    all_gather(context, torch.tensor([int(first and is_main_process)]), told)
    return int(told.argmax()) if told.any() else None


def gather_rows(context: Context, mine: Tensor, root: int) -> Tensor:
    """All ranks' ``mine`` [n_r, ...] in their order, on rank ``root``; [0, ...] elsewhere. Collective."""
    rows = torch.zeros(context.size, dtype=torch.int64)
    all_gather(context, torch.tensor([len(mine)]), rows)
    counts = rows.tolist() if context.rank == root else [0] * context.size
    whole = mine.new_empty(sum(counts), *mine.shape[1:])
    width = math.prod(mine.shape[1:]) * mine.element_size()
    sent = [len(mine) if rank == root else 0 for rank in range(context.size)]
    all_to_all_v(context, _as_rows(mine, width), sent, _as_rows(whole, width), counts)
    return whole


def _as_rows(tensor: Tensor, width: int) -> Tensor:
    return bytes_of(tensor).view(torch.int8).view(len(tensor), width)


def _save_pretrained(
    self: Any,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: Optional[dict[str, Any]] = None,
    save_original_format: bool = True,
    **kwargs: Any,
) -> None:
    if kwargs.get("distributed_checkpoint"):
        raise Unsupported("save_pretrained writes one whole checkpoint from rank 0: leave out distributed_checkpoint")
    modules: list[tuple[str, Any]] = list(find_experts(self))
    context = modules[0][1].expar.context
    writer = writer_of(modules[0][1], is_main_process)
    if writer is None:
        return
    state = dict(self.state_dict() if state_dict is None else state_dict)

    def names(index: int) -> list[str]:
        prefix, module = modules[index]
        return [f"{prefix}.{name}" for name in weight_names(module)]

    def gathered(index: int) -> dict[str, Tensor]:
        return {name: gather_rows(context, state[name], writer) for name in names(index)}

    talk = _Talk(context, writer, gathered)
    if context.rank != writer:
        talk.answer()
        return

    def converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return revert_weight_conversion(self, tensors) if save_original_format else tensors

    with talk:
        whole, module_of = dict(state), dict[str, int]()
        for index, (_, module) in enumerate(modules):
            absent = {name: _absent(state[name], module.num_experts) for name in names(index)}
            reverted = converted(absent)
            _refuse_unpacked(reverted)
            whole |= absent
            module_of |= dict.fromkeys(reverted, index)
        parameters = self.num_parameters() + sum(t.numel() - state[name].numel() for name, t in whole.items())
        written = _Written(module_of, lambda index: converted(talk.ask(index)))
        with (
            replaced(modeling_utils, "safe_save_file", written),
            replaced(modeling_utils, "revert_weight_conversion", lambda _, tensors: _apart(converted(tensors))),
            replaced(self, "num_parameters", lambda: parameters),
        ):
            type(self).save_pretrained(
                self, save_directory, state_dict=whole, save_original_format=save_original_format, **kwargs
            )


def _refuse_unpacked(tensors: dict[str, Tensor]) -> None:
    """transformers reverts the names of MXFP4 (5.23) or makes them a pattern's (5.17), and packs no numbers."""
    for name, tensor in tensors.items():
        if name.endswith(("_blocks", "_scales", "$")) and tensor.is_floating_point():
            raise Unsupported(
                f"transformers would save {name} as {tensor.dtype}, and cannot load that: this model was MXFP4, save it "
                "with save_original_format=False, and train what you load from there"
            )


def _absent(part: Tensor, experts: int) -> Tensor:
    """As the tensor of all experts, without memory."""
    return part.new_empty(experts, *part.shape[1:], device="meta")


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Absent tensors that were views of one count as much as they are."""
    return {name: tensor.clone() if tensor.is_meta else tensor for name, tensor in tensors.items()}


class _Talk:
    """The writer asks for modules, all ranks then gather that one's experts, until the writer leaves the context.

    writer   : its rank
    gathered : what it gets of a module. Collective.
    """

    _DONE, _FAILED = -1, -2

    def __init__(self, context: Context, writer: int, gathered: Callable[[int], dict[str, Tensor]]) -> None:
        self._context, self._writer, self._gathered = context, writer, gathered
        self._heard = True  # by the others: an error in what they do too is theirs already

    def ask(self, index: int) -> dict[str, Tensor]:
        self._heard = False
        broadcast(self._context, torch.tensor([index]), self._writer)
        got = self._gathered(index)
        self._heard = True
        return got

    def answer(self) -> None:
        asked = torch.zeros(1, dtype=torch.int64)
        while True:
            broadcast(self._context, asked, self._writer)
            if asked == self._DONE:
                return
            if asked == self._FAILED:
                raise Internal(
                    f"rank {self._writer} could not write the checkpoint, as it says",
                    rank=self._writer,
                    operation="save_pretrained",
                )
            self._gathered(int(asked))

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, *_: object) -> None:
        if self._heard:
            broadcast(self._context, torch.tensor([self._FAILED if kind else self._DONE]), self._writer)


class _Written:
    """In the place of safetensors' save_file: absent tensors are asked for when their turn comes, a module's at a time.

    module_of : of each absent tensor
    ask       : the tensors of a module
    """

    def __init__(self, module_of: dict[str, int], ask: Callable[[int], dict[str, Tensor]]) -> None:
        self._module_of, self._ask = module_of, ask
        self._module = -1
        self._held: dict[str, Tensor] = {}

    def __call__(self, tensors: dict[str, Tensor], filename: Any, metadata: Optional[dict[str, str]] = None) -> None:
        write_safetensors(filename, tensors, self._value, metadata)

    def _value(self, name: str) -> Tensor:
        if self._module_of[name] != self._module:
            self._held.clear()
            self._module = self._module_of[name]
            self._held = self._ask(self._module)
        return self._held[name]
