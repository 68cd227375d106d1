"""expar for PyTorch: operators with gradients, layers, parallel styles, and the ranks that torchrun or mpirun started.

::

    import torch
    import expar.torch as ep

    context = ep.context()                       # the ranks of torchrun, mpirun, or a process group
    sent = ep.dispatch(x, ids, context=context, experts=64)
    y = ep.grouped_mm(sent.rows, w, sent.counts, context=context)
    out = ep.combine(y, sent, weights)
"""

from .activation import activate
from .dispatcher import TokenDispatcher
from .experts import GroupedExperts
from .ops import Dispatched, combine, copy_over, dispatch, grouped_mm, reduce_over
from .ranks import communicator, context, parallel
from .shards import ExpertShard, expert_parameters
from .styles import ExpertParallel, ExpertTensorParallel, TensorParallel

__all__ = [
    "Dispatched",
    "ExpertParallel",
    "ExpertShard",
    "ExpertTensorParallel",
    "GroupedExperts",
    "TensorParallel",
    "TokenDispatcher",
    "activate",
    "combine",
    "communicator",
    "context",
    "copy_over",
    "dispatch",
    "expert_parameters",
    "grouped_mm",
    "parallel",
    "reduce_over",
]
