"""Expert parallelism for the Mixture-of-Experts models of Hugging Face transformers.

::

    import expar.transformers

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", dtype=torch.bfloat16)
    expar.transformers.enable(model)             # over the ranks that torchrun or mpirun has started
    model(input_ids).loss                        # each rank hands in its own tokens
"""

from .version import check as _check

_check()

from .experts import local_experts, slice_experts
from .loading import from_pretrained
from .model import enable

__all__ = ["enable", "from_pretrained", "local_experts", "slice_experts"]
