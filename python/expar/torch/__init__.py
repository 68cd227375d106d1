"""expar for PyTorch: operators with gradients, layers, parallel styles, and the ranks that torchrun or mpirun started.

::

    import torch
    import expar.torch as ep

    context = ep.context()                       # the ranks of torchrun, mpirun, or a process group
    sent = ep.dispatch(x, ids, context=context, experts=64)
    y = ep.grouped_mm(sent.rows, w, sent.counts, context=context)
    out = ep.combine(y, sent, weights)

    layer = ep.MoELayer(1024, 512, experts=64, topk=8, router="qwen3_moe", balance=0.01, context=context)
    loss = layer(x).square().mean() + layer.aux_loss
"""

try:
    import torch as _torch
except ImportError as error:
    raise ImportError("expar.torch needs PyTorch 2.9 or newer: pip install torch") from error
if tuple(int(part) for part in _torch.__version__.split(".")[:2]) < (2, 9):
    raise ImportError(f"expar.torch needs PyTorch 2.9 or newer, this is {_torch.__version__}: pip install -U torch")

from .activation import activate
from .checkpoint import checkpoint_context, checkpoint_policy
from .data_parallel import average_gradients, clip_gradients, distributed_data_parallel, fully_shard
from .dispatcher import TokenDispatcher
from .experts import GroupedExperts
from .layer import MoELayer
from .ops import Dispatched, combine, copy_over, dispatch, grouped_mm, reduce_over
from .ranks import alone, communicator, context, parallel
from .shards import ExpertShard, expert_parameters
from .styles import ExpertParallel, ExpertTensorParallel, TensorParallel
from .visit import visit_experts

__all__ = [
    "Dispatched",
    "ExpertParallel",
    "ExpertShard",
    "ExpertTensorParallel",
    "GroupedExperts",
    "MoELayer",
    "TensorParallel",
    "TokenDispatcher",
    "activate",
    "alone",
    "average_gradients",
    "checkpoint_context",
    "checkpoint_policy",
    "clip_gradients",
    "combine",
    "communicator",
    "context",
    "copy_over",
    "dispatch",
    "distributed_data_parallel",
    "expert_parameters",
    "fully_shard",
    "grouped_mm",
    "parallel",
    "reduce_over",
    "visit_experts",
]
