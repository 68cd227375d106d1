"""The token dispatcher in torchtitan's shape, with experts that are sliced as DTensors, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from processes import on_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import expar
import expar.torch as ep

TOKENS, TOPK, EXPERTS, HIDDEN, INNER = 11, 2, 5, 16, 6


def batch():
    g = torch.Generator().manual_seed(5)
    x, dout = torch.randn(2, TOKENS, HIDDEN, generator=g)
    scores = torch.rand(TOKENS, TOPK, generator=g)
    ids = torch.randint(-1, EXPERTS, (TOKENS, TOPK), generator=g)
    torch.manual_seed(5)
    experts = ep.GroupedExperts(HIDDEN, INNER, EXPERTS)
    experts.init_weights(init_std=0.3)
    return x, scores, ids, dout, experts


def on_a_mesh(before):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    x, scores, ids, dout, experts = batch()
    begin, end = (TOKENS * r // mesh.size() for r in (mesh.get_rank(), mesh.get_rank() + 1))
    x, scores, ids, dout = (whole[begin:end].clone() for whole in (x, scores, ids, dout))
    x.requires_grad_()
    scores.requires_grad_()
    bounds = [min(rank * -(-EXPERTS // mesh.size()), EXPERTS) for rank in (mesh.get_rank(), mesh.get_rank() + 1)]
    local = ep.GroupedExperts(HIDDEN, INNER, bounds[1] - bounds[0])
    with torch.no_grad():
        for name, w in experts.named_parameters():
            getattr(local, name).copy_(w[slice(*bounds)])

    dispatcher = ep.TokenDispatcher(EXPERTS, TOPK, score_before_experts=before)
    dispatcher.wire_meshes(ep_mesh=mesh)
    routed, counts, metadata = dispatcher.dispatch(x, scores, ids)
    assert routed.shape == (int(counts.sum()), HIDDEN)
    out = dispatcher.combine(local(routed, counts), metadata, x)
    (out * dout).sum().backward()
    return out.detach(), x.grad, scores.grad, *(w.grad for w in local.parameters())


def eagerly(before):
    x, scores, ids, dout, experts = batch()
    x, scores, experts = x.double().requires_grad_(), scores.double().requires_grad_(), experts.double()
    out = []
    for t in range(TOKENS):
        total = 0 * x[t]
        for k, e in enumerate(ids[t].tolist()):
            if e < 0:
                continue
            row = x[t] * scores[t, k] if before else x[t]
            y = experts.w2[e] @ (nn.functional.silu(experts.w1[e] @ row) * (experts.w3[e] @ row))
            total = total + (y if before else scores[t, k] * y)
        out.append(total)
    out = torch.stack(out)
    (out * dout).sum().backward()
    return out.detach(), x.grad, scores.grad, *(w.grad for w in experts.parameters())


@pytest.mark.parametrize("before", [False, True], ids=["scores after", "scores before"])
def test_tokens_reach_sliced_experts_and_the_gradients_are_a_plain_loops(before):
    (expected,) = on_processes(1, eagerly, before)
    one = None
    for ranks in (1, 2, 4):
        got = [torch.cat(parts) for parts in zip(*on_processes(ranks, on_a_mesh, before))]
        one = one or got
        for mine, same, want in zip(got, one, expected):
            assert torch.equal(mine, same)
            torch.testing.assert_close(mine.double(), want, rtol=2e-5, atol=2e-5)


def without_a_mesh():
    x, scores, ids, _, experts = batch()
    dispatcher = ep.TokenDispatcher(EXPERTS, TOPK)
    with pytest.raises(expar.BadArgument, match=r"ids \[11, 2\]; the last two should be \[11, 3\]"):
        ep.TokenDispatcher(EXPERTS, 3).dispatch(x, scores, ids)
    routed, counts, metadata = dispatcher.dispatch(x, scores, ids)
    assert counts.tolist() == ids[ids >= 0].bincount(minlength=EXPERTS).tolist()
    return dispatcher.combine(experts(routed, counts), metadata, x).detach()


def test_without_a_mesh_all_experts_are_this_ranks():
    apart = on_processes(2, without_a_mesh)
    (out, *_), = on_processes(1, on_a_mesh, False)
    assert torch.equal(apart[0], out) and torch.equal(apart[1], out)
