"""Parallel styles: what goes in and comes out is one process's, for any mesh, in bytes where experts are whole."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from processes import on_processes
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

import expar
import expar.torch as ep
from expar.torch.shards import local_of

HIDDEN, INNER, EXPERTS = 16, 5, 5  # DTensor cuts a 5 over 4 ranks into 2, 2, 1 and 0

# (which expert each token of the batch goes to, where the tokens of each of four ranks begin)
CASES = {
    "uneven": ([3, 0, 0, 4, 2, 3, 3, 0, 4, 4, 2, 3, 0], [0, 6, 7, 11, 13]),
    "a rank without tokens": ([1, 1, 4, 0, 2], [0, 0, 2, 2, 5]),
    "one busy expert": ([2] * 9, [0, 1, 5, 8, 9]),
    "no tokens": ([], [0, 0, 0, 0, 0]),
}


def weights():
    torch.manual_seed(3)
    experts = ep.GroupedExperts(HIDDEN, INNER, EXPERTS)
    experts.init_weights(init_std=0.3)
    return experts


def batch(case, dtype=torch.float32):
    ids = torch.tensor(CASES[case][0], dtype=torch.int64)
    g = torch.Generator().manual_seed(11)
    x, dout = torch.randn(2, len(ids), HIDDEN, generator=g).to(dtype)
    return ids, x, dout


def trained(experts, case, coordinate, ranks, dtype=torch.float32):
    """Output, dx of this rank's tokens in their order, and its gradients."""
    starts = CASES[case][1][:: 4 // ranks]
    mine = slice(starts[coordinate], starts[coordinate + 1])
    ids, x, dout = (whole[mine] for whole in batch(case, dtype))
    order = ids.argsort(stable=True)
    rows = x[order].requires_grad_()
    experts.zero_grad()
    out = experts(rows, ids.bincount(minlength=EXPERTS))
    assert out.requires_grad and out.shape == rows.shape
    (out * dout[order]).sum().backward()
    back = order.argsort()
    return [out.detach()[back], rows.grad[back]], [w.grad for w in (experts.w1, experts.w2, experts.w3)]


def eager(case):
    """One process, one token after the other, in double."""
    experts = weights().double()
    ids, x, dout = batch(case)
    x = x.double().requires_grad_()
    rows = [
        experts.w2[e] @ (nn.functional.silu(experts.w1[e] @ x[t]) * (experts.w3[e] @ x[t]))
        for t, e in enumerate(ids.tolist())
    ]
    out = torch.stack(rows) if rows else x * 1
    (out * dout).sum().backward()
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in (experts.w1, experts.w2, experts.w3)]
    return [out.detach(), x.grad], gradients


STYLES = {"ep": ep.ExpertParallel, "tp": ep.TensorParallel, "ep_tp": ep.ExpertTensorParallel}


def mesh_of(sizes):
    """A mesh of the dims that are there, and this rank's place along ep."""
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    return mesh, mesh.get_local_rank("ep") if "ep" in sizes else 0


def styled(sizes, dtype="float32"):
    mesh, coordinate = mesh_of(sizes)
    style = STYLES["_".join(sizes)]()
    first, experts = (parallelize_module(weights().to(getattr(torch, dtype)), mesh, style) for _ in range(2))
    results = {}
    for case in CASES:
        # Two layers of one style, one inside the other in time.
        rows = torch.zeros(1, HIDDEN, dtype=experts.w1.dtype)
        other = first(rows, torch.tensor([0, 1, 0, 0, 0]))
        shared, gradients = trained(experts, case, coordinate, sizes.get("ep", 1), getattr(torch, dtype))
        other.sum().backward()
        assert all(isinstance(g, DTensor) for g in gradients)
        results[case] = coordinate, shared, [g.full_tensor() for g in gradients]
    return results


def alone(dtype="float32"):
    experts = weights().to(getattr(torch, dtype))
    return {case: (0, *trained(experts, case, 0, 1, getattr(torch, dtype))) for case in CASES}


def eagerly():
    return {case: eager(case) for case in CASES}


def whole(results, case):
    """The batch's outputs and dx, each rank's part once, and the gradients, which all ranks have alike."""
    parts = {}
    for rank in results:
        coordinate, shared, gradients = rank[case]
        for mine, others in zip(shared, parts.setdefault(coordinate, shared)):
            assert torch.equal(mine, others)
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][case][2]))
    return [torch.cat(all_parts) for all_parts in zip(*(parts[c] for c in sorted(parts)))] + results[0][case][2]


@pytest.mark.parametrize(
    "sizes", [{"ep": 1}, {"ep": 4}, {"tp": 2}, {"tp": 4}, {"ep": 2, "tp": 2}, {"ep": 1, "tp": 2}], ids=str
)
def test_a_style_computes_what_a_plain_loop_does(sizes):
    ranks = 1
    for size in sizes.values():
        ranks *= size
    results, (expected,) = on_processes(ranks, styled, sizes), on_processes(1, eagerly)
    for case in CASES:
        shared, gradients = expected[case]
        for name, got, want in zip(("out", "dx", "dw1", "dw2", "dw3"), whole(results, case), shared + gradients):
            torch.testing.assert_close(
                got.double(), want, rtol=2e-5, atol=2e-5, msg=lambda text: f"{case}, {name}: {text}"
            )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expert_parallelism_gives_one_process_s_bytes_on_any_number_of_ranks(dtype):
    (expected,) = on_processes(1, alone, dtype)
    for ranks in (1, 2, 4):
        results = on_processes(ranks, styled, {"ep": ranks}, dtype)
        for case in CASES:
            for got, want in zip(whole(results, case), expected[case][1] + expected[case][2]):
                assert torch.equal(got, want), (ranks, case)


def layout(sizes):
    mesh, _ = mesh_of(sizes)
    experts = STYLES["_".join(sizes)]().apply(weights(), mesh)
    shapes = {name: (w.placements, tuple(w.to_local().shape)) for name, w in experts.named_parameters()}
    loaded = {name: w.full_tensor() for name, w in experts.named_parameters()}
    torch.manual_seed(3)
    experts.init_weights(init_std=0.02)
    experts.init_weights(init_std=0.3)
    again = {name: w.full_tensor() for name, w in experts.named_parameters()}
    return shapes, loaded, again


def plain_weights():
    torch.manual_seed(3)
    experts = ep.GroupedExperts(HIDDEN, INNER, EXPERTS)
    experts.init_weights(init_std=0.3)
    return {name: w.detach() for name, w in experts.named_parameters()}


def test_weights_lie_as_dtensors_with_the_values_of_one_process():
    (expected,) = on_processes(1, plain_weights)
    results = on_processes(4, layout, {"ep": 2, "tp": 2})
    for rank, (shapes, loaded, again) in enumerate(results):
        experts, inner = 3 - rank // 2, 3 - rank % 2
        assert shapes == {
            "w1": ((Shard(0), Shard(1)), (experts, inner, HIDDEN)),
            "w2": ((Shard(0), Shard(2)), (experts, HIDDEN, inner)),
            "w3": ((Shard(0), Shard(1)), (experts, inner, HIDDEN)),
        }
        for name, value in expected.items():
            assert torch.equal(loaded[name], value) and torch.equal(again[name], value)


class Model(nn.Module):
    def __init__(self, device=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(2))
        for layer in self.layers:
            layer["experts"] = ep.GroupedExperts(HIDDEN, INNER, EXPERTS, device=device)

    def init_weights(self):
        torch.manual_seed(8)
        for layer in self.layers:
            layer["experts"].init_weights()


def without_memory():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    model = Model("meta")
    parallelize_module(model, mesh, {"layers.*.experts": ep.ExpertTensorParallel()})
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").init_weights()
    plain = Model()
    plain.init_weights()
    for name, p in model.named_parameters():
        assert p.requires_grad and torch.equal(p.full_tensor(), plain.get_parameter(name)), name


def test_a_model_made_without_memory_is_sliced_by_name_and_drawn_afterwards():
    on_processes(4, without_memory)


def copied():
    mesh = init_device_mesh("cpu", (2,))
    experts = parallelize_module(weights(), mesh, ep.ExpertParallel())
    copy = deepcopy(experts)
    with torch.no_grad():
        for p in experts.parameters():
            p.zero_()
    (out, _), _ = trained(experts, "uneven", mesh.get_rank(), 2)
    (kept, _), gradients = trained(copy, "uneven", mesh.get_rank(), 2)
    assert not out.any() and kept.any() and all(g is not None for g in gradients)


def test_a_copy_of_sliced_experts_has_weights_of_its_own():
    on_processes(2, copied)


class ForeignExperts(nn.Module):
    """Somebody else's, with the same three matrices."""

    def __init__(self, w1, w2, w3):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Parameter(w.detach().clone()) for w in (w1, w2, w3))

    def forward(self, x, num_tokens_per_expert):
        w1, w2, w3 = (w.to_local() for w in (self.w1, self.w2, self.w3))
        rows = x.split(num_tokens_per_expert.tolist())
        return torch.cat([(nn.functional.silu(r @ w1[e].T) * (r @ w3[e].T)) @ w2[e].T for e, r in enumerate(rows)])


def foreign():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    own = weights()
    style, results = ep.ExpertTensorParallel(), []
    for experts in (ForeignExperts(own.w1, own.w2, own.w3), own):
        shared, gradients = trained(style.apply(experts, mesh), "uneven", mesh.get_local_rank("ep"), 2)
        results.append(shared + [g.to_local() for g in gradients])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_experts_of_others_with_the_same_matrices_are_sliced_too():
    on_processes(4, foreign)


def compiled():
    mesh = init_device_mesh("cpu", (2,))
    experts = parallelize_module(weights(), mesh, ep.ExpertParallel())
    plain = trained(experts, "uneven", mesh.get_rank(), 2)
    again = trained(torch.compile(experts, backend="aot_eager", fullgraph=True), "uneven", mesh.get_rank(), 2)
    for one, other in zip(plain[0] + plain[1], again[0] + again[1]):
        assert torch.equal(local_of(one), local_of(other))


def test_torch_compile_takes_a_style_as_one_graph():
    on_processes(2, compiled)


def refusals():
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
    grid = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "ep"))
    cuda = DeviceMesh("cuda", [0], _init_backend=False)
    said = {}

    def note(what, style, module, where):
        with pytest.raises(expar.BadArgument) as caught:
            parallelize_module(module, where, style)
        said[what] = str(caught.value)

    note("module", ep.ExpertParallel(), nn.Sequential(nn.Linear(3, 3)), mesh)
    note("shapes", ep.ExpertParallel(), nn.Bilinear(2, 3, 4), mesh)
    note("grid", ep.ExpertParallel(), weights(), grid)
    note("names", ep.ExpertTensorParallel(), weights(), grid)
    note("one dim", ep.ExpertTensorParallel(), weights(), mesh)
    note("cuda", ep.TensorParallel(), weights(), cuda)
    experts = parallelize_module(weights(), mesh, ep.ExpertParallel())
    note("twice", ep.ExpertParallel(), experts, mesh)
    with pytest.raises(expar.BadArgument, match=r"is \[2\], should be \[5\]: one for every expert"):
        experts(torch.zeros(2, HIDDEN), torch.tensor([1, 1]))
    return said


def wrong_counts():
    experts = ep.ExpertParallel().apply(weights(), init_device_mesh("cpu", (2,)))
    x, right = torch.zeros(2, HIDDEN), torch.tensor([1, 1, 0, 0, 0])
    for forward in (experts, torch.compile(experts, backend="aot_eager", fullgraph=True)):
        for wrong, why in (
            (torch.tensor([1, 1, 0, 1, 0]), "adds up to 3, routed_input has 2 rows"),
            (right[:3], r"is \[3\], should be \[5\]: one for every expert"),
        ):
            with pytest.raises(expar.BadArgument, match="^rank 1: .*num_tokens_per_expert " + why):
                forward(x, wrong if torch.distributed.get_rank() == 1 else right)
            assert forward(x, right).shape == (2, HIDDEN)


def test_counts_that_do_not_fit_one_rank_s_rows_are_told_to_all():
    on_processes(2, wrong_counts)


def test_what_cannot_be_parallelised_says_what_to_type():
    (said,) = on_processes(1, refusals)
    assert "cannot slice Sequential: it has no parameter w1" in said["module"]
    assert "parallelize_module(model, mesh, {'layers.*.experts': ExpertParallel()})" in said["module"]
    assert "has no parameter w1" in said["shapes"]
    assert "takes a mesh of dims ('ep',) and got ('dp', 'ep'): hand in mesh['ep']" in said["grid"]
    assert "hand in mesh['ep', 'tp'], or init_device_mesh('cpu', (2, 2), mesh_dim_names=('ep', 'tp'))" in said["names"]
    assert "got ('ep',)" in said["one dim"]
    assert "a mesh on 'cuda'; expar computes on the CPU: init_device_mesh('cpu'" in said["cuda"]
    assert "w1 is sliced already" in said["twice"]
