"""hyper_parallel's protocol: style.apply(module, mesh) computes what one process does, and programs bring hooks."""

from __future__ import annotations

import math

import pytest
import styles_test as plain
import torch
import torch.distributed as dist
from processes import on_processes
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import expar
from expar.hyper_parallel import (
    BaseExpertParallel,
    ExpertParallel,
    ExpertTensorParallel,
    GroupedExperts,
    TensorParallel,
)

STYLES = {"ep": ExpertParallel, "tp": TensorParallel, "ep_tp": ExpertTensorParallel}


def styled(sizes):
    """As in styles_test, with one style for two modules, of which the first is called inside the other's graph."""
    mesh, coordinate = plain.mesh_of(sizes)
    style = STYLES["_".join(sizes)]()
    first, experts = (style.apply(plain.weights(), mesh) for _ in range(2))
    results = {}
    for case in plain.CASES:
        other = first(torch.zeros(1, plain.HIDDEN), torch.tensor([0, 1, 0, 0, 0]))
        shared, gradients = plain.trained(experts, case, coordinate, sizes.get("ep", 1))
        other.sum().backward()
        results[case] = coordinate, shared, [g.full_tensor() for g in gradients]
    assert not getattr(style, "_sent", None)
    return results


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"ep": 4}, {"tp": 2}, {"ep": 2, "tp": 2}], ids=str)
def test_applied_styles_compute_what_a_plain_loop_does(sizes):
    """Cases of styles_test: ranks without tokens and without experts among them."""
    results, (expected,) = on_processes(math.prod(sizes.values()), styled, sizes), on_processes(1, plain.eagerly)
    for case in plain.CASES:
        shared, gradients = expected[case]
        for name, got, want in zip(("out", "dx", "dw1", "dw2", "dw3"), plain.whole(results, case), shared + gradients):
            torch.testing.assert_close(
                got.double(), want, rtol=2e-5, atol=2e-5, msg=lambda text: f"{case}, {name}: {text}"
            )


class Counted(ExpertParallel):
    """A program's style that looks at what passes by."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _token_dispatch(self, module, inputs, device_mesh):
        rows, counts = super()._token_dispatch(module, inputs, device_mesh)
        self.seen.append(counts.tolist())
        return rows, counts


class OneExpertEach(BaseExpertParallel):
    """A program's own strategy on PyTorch's collectives, for as many experts as ranks."""

    def _partition_fn(self, name, module, device_mesh):
        for key, parameter in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(parameter.detach(), device_mesh, [Shard(0)])
            module.register_parameter(key, torch.nn.Parameter(part))

    def _token_dispatch(self, module, inputs, device_mesh):
        rows, counts = inputs
        came = torch.empty_like(counts)
        dist.all_to_all_single(came, counts, group=device_mesh.get_group())
        module.splits = counts.tolist(), came.tolist()
        rows = all_to_all_single_autograd(rows, came.tolist(), counts.tolist(), device_mesh.get_group())
        return rows, came.sum().view(1)

    def _token_combine(self, module, routed_output, device_mesh):
        sent, came = module.splits
        return all_to_all_single_autograd(routed_output, sent, came, device_mesh.get_group())


class AskingAnother(GroupedExperts):
    """Runs another module between its own two hooks."""

    def forward(self, x, num_tokens_per_expert):
        self.others[0](torch.zeros(1, plain.HIDDEN), torch.tensor([1, 0]))
        return super().forward(x, num_tokens_per_expert)


def programs():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    torch.manual_seed(4)
    whole = GroupedExperts(plain.HIDDEN, plain.INNER, 2)
    counted = Counted()
    modules = []
    for style, kind in (
        (None, GroupedExperts),
        (counted, GroupedExperts),
        (OneExpertEach(), GroupedExperts),
        (counted, AskingAnother),
    ):
        module = kind(plain.HIDDEN, plain.INNER, 2)
        module.load_state_dict(whole.state_dict())
        modules.append(module if style is None else style.apply(module, mesh))
    modules[3].others = [modules[1]]  # in a list, so that it is no child
    rank = mesh.get_rank()
    rows = torch.randn(2, 5, plain.HIDDEN, generator=torch.Generator().manual_seed(6))[rank]
    counts = torch.tensor([4, 1] if rank == 0 else [5, 0])
    outs, gradients = [], []
    for module in modules:
        x = rows.clone().requires_grad_()
        out = module(x, counts)
        out.square().sum().backward()
        outs.append(out.detach())
        gradients.append(x.grad)
    for out, gradient in zip(outs[1:], gradients[1:]):
        torch.testing.assert_close(out, outs[0])
        torch.testing.assert_close(gradient, gradients[0])
    assert counted.seen == ([[9], [9], [2]] if rank == 0 else [[1], [1], [0]])
    # The experts' gradients are those of the sum of both ranks' losses.
    for mine, theirs in zip(modules[1].parameters(), modules[2].parameters()):
        torch.testing.assert_close(mine.grad.to_local(), theirs.grad.to_local())
    with pytest.raises(expar.BadArgument, match=r"num_tokens_per_expert is \[3\], should be \[2\]"):
        modules[1](rows, torch.tensor([1, 2, 2]))
    with pytest.raises(RuntimeError, match="once on a module"):
        counted.apply(modules[1], mesh)


def test_hooks_of_a_program_run_around_the_experts():
    on_processes(2, programs)


def test_a_style_without_hooks_is_none():
    with pytest.raises(TypeError, match="abstract"):
        BaseExpertParallel()
