"""What the experts of a model had to do: loads and routes, recorded, summed up, and kept in files.

Loads are rows per expert. A :class:`Recorder` keeps those of the newest steps, ``[S, layers, E]``, and shows them in
TensorBoard; files are its own JSON, the dumps of SGLang and vLLM, and expar's ``*.routes.gz``. Pure Python: NumPy is
all it needs, PyTorch only for ``.pt`` files.
"""

from .recorder import Recorder
from .routes import Routes, read_routes, write_routes
from .sglang import read_sglang, write_sglang
from .statistics import balancedness, gini, max_over_mean, mean_over_max, rank_loads
from .vllm import from_vllm_window, read_vllm, write_vllm

__all__ = [
    "Recorder",
    "Routes",
    "balancedness",
    "from_vllm_window",
    "gini",
    "max_over_mean",
    "mean_over_max",
    "rank_loads",
    "read_routes",
    "read_sglang",
    "read_vllm",
    "write_routes",
    "write_sglang",
    "write_vllm",
]
