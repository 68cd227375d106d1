"""hyper_parallel's styles for experts: ``apply(module, device_mesh)``, with hooks that a program may replace.

::

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    experts = ExpertParallel().apply(GroupedExperts(dim, hidden_dim, num_experts), mesh)
    out = experts(routed_input, num_tokens_per_expert)

What rows do is what expar.torch's styles of the same names do. Those wrap the forward, which torch.compile traces; these
put hooks around it, whose subclasses say themselves how weights lie and how tokens travel.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import ParallelStyle

from .torch import styles
from .torch.experts import GroupedExperts
from .torch.ops import Dispatched, combine
from .torch.styles import TensorParallel

__all__ = ["BaseExpertParallel", "ExpertParallel", "ExpertTensorParallel", "GroupedExperts", "TensorParallel"]


class BaseExpertParallel(ParallelStyle, ABC):
    """A style made of three hooks, which ``torch.distributed.tensor.distribute_module`` calls."""

    def apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Partitions the weights and puts the hooks around the forward. Returns the module, changed in place.

        Parameters that _partition_fn leaves as they are become DTensors that every rank has whole. Collective over the
        mesh. Raises RuntimeError (a module that is distributed already), and what _partition_fn raises.
        """
        return distribute_module(module, device_mesh, self._partition_fn, self._token_dispatch, self._token_combine)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self.apply(module, device_mesh)

    @abstractmethod
    def _partition_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        """Slices the parameters of ``module``, which is called ``name`` inside what is distributed; "" is the whole."""

    @abstractmethod
    def _token_dispatch(self, module: nn.Module, inputs: Any, device_mesh: DeviceMesh) -> Any:
        """Before the forward: what it gets in place of ``inputs``, a tuple."""

    @abstractmethod
    def _token_combine(self, module: nn.Module, routed_output: Any, device_mesh: DeviceMesh) -> Any:
        """After the forward: what the caller gets in place of ``routed_output``."""


class ExpertParallel(BaseExpertParallel):
    """Each rank holds some experts, whole; tokens travel. For a mesh of one dim.

    As expar.torch.ExpertParallel, which says what goes in and comes out. What is kept between the hooks is kept for each
    module, so that one style serves any number of them.
    """

    _style: type[Any] = styles.ExpertParallel

    def __init__(self) -> None:
        super().__init__()
        self._sent: weakref.WeakKeyDictionary[nn.Module, Dispatched] = weakref.WeakKeyDictionary()

    def _partition_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if name == "":
            self._style().partition(module, device_mesh)

    def _token_dispatch(self, module: nn.Module, inputs: Any, device_mesh: DeviceMesh) -> Any:
        """(routed_input [N, H] sorted by expert, num_tokens_per_expert [E]) to (rows [R, H] of this rank's experts,
        counts [L])."""
        routed_input, num_tokens_per_expert = inputs
        way = self._style().way(device_mesh, module.get_parameter("w1").shape[0])
        sent = styles.send(way, routed_input, num_tokens_per_expert)
        self._sent[module] = sent
        return sent.rows, sent.counts

    def _token_combine(self, module: nn.Module, routed_output: Any, device_mesh: DeviceMesh) -> Tensor:
        """Results [R, H] of the rows that _token_dispatch gave, to [N, H] in the order of routed_input."""
        return combine(routed_output, self._sent.pop(module))


class ExpertTensorParallel(ExpertParallel):
    """Experts are spread along ep and sliced along tp. For a mesh of dims ("ep", "tp"), as expar.torch's."""

    _style = styles.ExpertTensorParallel
