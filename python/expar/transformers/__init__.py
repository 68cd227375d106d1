"""Expert parallelism for the Mixture-of-Experts models of Hugging Face transformers.

::

    import expar.transformers

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", dtype=torch.bfloat16)
    expar.transformers.enable(model)             # over the ranks that torchrun or mpirun has started
    model(input_ids).loss                        # each rank hands in its own tokens
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from .version import check as _check

_check()

from .experts import local_experts, slice_experts
from .loading import from_pretrained
from .model import enable

__all__ = ["Trainer", "TrainerMixin", "enable", "from_pretrained", "local_experts", "slice_experts"]

if _TYPE_CHECKING:
    from .trainer import Trainer, TrainerMixin


def __getattr__(name: str) -> object:
    if name in ("Trainer", "TrainerMixin"):  # these need accelerate
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
