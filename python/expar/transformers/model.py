"""A model of transformers becomes expert-parallel."""

from __future__ import annotations

from types import MethodType
from typing import Any, Optional, TypeVar

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .. import Communicator, Context, barrier
from ..errors import BadArgument
from ..torch.agree import told_to_all
from ..torch.data_parallel import refuse_plain_ddp
from ..torch.shards import ExpertShard, Where, refuse_adapters, shard_over
from .experts import APART, check_experts, find_experts, slice_experts
from .forward import enabled, experts_forward
from .generation import generate_together
from .llama4 import block_forward
from .saving import save_whole

NAME = "expar"

Model = TypeVar("Model", bound=nn.Module)


def enable(model: Model, context: Where = None) -> Model:
    """Makes a Mixture-of-Experts model of transformers expert-parallel over the ranks of ``context``; returns it.

    model   : on the CPU, float32 or bfloat16; with all experts, or with this rank's alone
    context : the ranks that tokens travel among: a process group, a Context, a DeviceMesh with the dims ep and dp
              (replicas of the experts) or either; None: all ranks that a launcher has started

    Each rank keeps its experts' parameters, [L, ...] of [E, ...], and lets go of the others' memory; what is not
    experts stays whole, and is to be the same on all ranks. After that each rank hands in its own tokens, of any
    number, and gets their results: ``model(...)``, ``generate``, gradient checkpointing. A pass is collective, forward
    and backward: each rank makes the same number of them. Gradients of experts are those of the sum of all ranks'
    losses; expar.torch's average_gradients, distributed_data_parallel and fully_shard make all of them those of the
    mean loss, as in one process. ``save_pretrained`` is collective too and writes the whole model. A second call for
    the same ranks does nothing.

    Collective over these ranks. Raises BadArgument (no experts that this package knows; experts that it cannot compute,
    by module and attribute; adapters of experts; slices of experts; other ranks than before; another owner of the name
    "expar" among transformers' experts implementations), on all these ranks and before anything has changed, and as
    expar.torch.context.
    """
    ranks, slices, shard = shard_over(context)
    with told_to_all(ranks):
        modules = _checked(model, ranks, slices, shard)
    barrier(ranks)  # where one that found nothing wrong is told; before anything has changed
    for name, module in modules:
        slice_experts(module, ranks, name)
    for name, module in modules:
        module.expert_shard = shard  # type: ignore[assignment]
        module.expar = enabled(name, module, ranks)  # type: ignore[assignment]
    _select(model, [module for _, module in modules])
    if ranks.size > 1 and hasattr(model, "generate"):
        generate_together(model, ranks)
    if ranks.size > 1 and hasattr(model, "save_pretrained"):
        save_whole(model)
    if ranks.size > 1:
        refuse_plain_ddp(model, "expar.transformers.Trainer, or expar.torch.distributed_data_parallel(model)")
    return model


def _checked(
    model: nn.Module, ranks: Context, slices: Optional[Communicator], shard: ExpertShard
) -> list[tuple[str, nn.Module]]:
    """What find_experts finds. Raises what enable() does; the model stays as it is."""
    modules = list(find_experts(model))
    if not modules:
        raise BadArgument(
            f"{type(model).__name__} has no experts that expar knows: it takes models whose experts transformers "
            "computes through its experts implementations (Mixtral, Qwen3-MoE, DeepSeek-V3, GPT-OSS, ...), and Llama 4"
        )
    if slices is not None and slices.size > 1:
        raise BadArgument("the mesh slices experts along tp, which enable cannot: hand in a mesh of the dims dp and ep")
    _register()
    for name, module in modules:
        _check_owner(name, module, shard)
        refuse_adapters(model, name, module)
        check_experts(module, ranks, name)
    return modules


def _check_owner(name: str, module: nn.Module, shard: ExpertShard) -> None:
    known = getattr(module, "expert_shard", shard)
    if known != shard:
        raise BadArgument(
            f"{name} is part {known.part} of {known.parts} of the experts already, and now should be part {shard.part} "
            f"of {shard.parts}: load the model again for other ranks"
        )
    if getattr(module, "_is_expert_parallel", False):
        raise BadArgument(f"{name} is in transformers' own expert parallelism: load the model without it")


def _register() -> None:
    if ALL_EXPERTS_FUNCTIONS.get(NAME, experts_forward) is not experts_forward:
        raise BadArgument(
            f"the experts implementation '{NAME}' of transformers is {ALL_EXPERTS_FUNCTIONS[NAME]!r}, which is not "
            "ours: whoever registered it must choose another name"
        )
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def _select(model: Any, modules: list[nn.Module]) -> None:
    """Modules call what their config names; a release with a fixed list of names refuses ours, yet calls it."""
    try:
        model.set_experts_implementation(NAME)
    except (AttributeError, ValueError):
        pass
    for module in modules:
        if type(module).__name__ not in APART:
            module.config._experts_implementation = NAME  # type: ignore[union-attr]
    for block in model.modules():
        if type(block).__name__ == "Llama4TextMoe":
            block.forward = MethodType(block_forward, block)
