"""visit_experts: the same as plain PyTorch, the same bytes on any number of ranks, traced and checked."""

from __future__ import annotations

import gc

import pytest
import torch
from ranks import on_ranks
from torch.library import opcheck

import expar
import expar.torch as ep
from expar.torch.contexts import name_of
from expar.torch.states import live_states

TOKENS, TOPK, EXPERTS, HIDDEN, INNER = 12, 3, 5, 16, 8

torch.set_num_threads(1)


def batch(activation, bias):
    """The whole batch and all experts; token 3 goes nowhere, token 4 twice to one expert."""
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(-1, EXPERTS, (TOKENS, TOPK), generator=g)
    ids[3], ids[4] = -1, torch.tensor([2, 2, 0])
    wide = 2 * INNER if activation == "swiglu" else INNER
    shapes = [(TOKENS, HIDDEN), (TOKENS, TOPK), (EXPERTS, wide, HIDDEN), (EXPERTS, HIDDEN, INNER)]
    shapes += [(EXPERTS, wide), (EXPERTS, HIDDEN)] if bias else []
    x, weights, *parameters = (torch.randn(shape, generator=g) for shape in shapes)
    return ids, torch.randn(TOKENS, HIDDEN, generator=g), [x, weights, *parameters]


def mine(tensor, context):
    begin, end = (len(tensor) * r // context.size for r in (context.rank, context.rank + 1))
    return tensor[begin:end].clone()


def step(context, activation="gelu", bias=True, dtype=torch.float32):
    """Output and gradients of this rank's part of the batch."""
    ids, dout, leaves = batch(activation, bias)
    kinds = [dtype, torch.float32, dtype, dtype, torch.float32, torch.float32]
    leaves = [mine(t, context).to(kind).requires_grad_() for t, kind in zip(leaves, kinds)]
    x, weights, *parameters = leaves
    out = ep.visit_experts(
        x, mine(ids, context), weights, *parameters, context=context, experts=EXPERTS, activation=activation
    )
    out.backward(mine(dout, context).to(dtype))
    return [out.detach()] + [leaf.grad for leaf in leaves]


def joined(results):
    return [torch.cat(parts) for parts in zip(*results)]


def eager(activation, ids, x, weights, up, down, up_bias=None, down_bias=None):
    out = torch.zeros_like(x)
    for k in range(TOPK):
        for e in range(EXPERTS):
            pre = x @ up[e].T + (0 if up_bias is None else up_bias[e])
            if activation == "swiglu":
                gate, value = pre.chunk(2, 1)
                h = torch.nn.functional.silu(gate) * value
            else:
                h = torch.nn.functional.gelu(pre)
            y = h @ down[e].T + (0 if down_bias is None else down_bias[e])
            out = out + (ids[:, k] == e)[:, None] * weights[:, k, None] * y
    return out


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_plain_pytorch(activation, bias):
    ids, dout, leaves = batch(activation, bias)
    leaves = [t.double().requires_grad_() for t in leaves]
    out = eager(activation, ids, *leaves)
    out.backward(dout.double())
    got = joined(on_ranks(2, lambda c: step(c, activation, bias)))
    for wanted, found in zip([out] + [leaf.grad for leaf in leaves], got, strict=True):
        # Sums of at most HIDDEN products in f32, twice over.
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=4 * HIDDEN * 6e-8 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_same_on_any_number_of_ranks(dtype):
    one = joined(on_ranks(1, lambda c: step(c, dtype=dtype)))
    for ranks in (2, 3, 7):
        for a, b in zip(one, joined(on_ranks(ranks, lambda c: step(c, dtype=dtype))), strict=True):
            assert a.view(torch.uint8).equal(b.view(torch.uint8))


def test_the_operator_is_traced_and_checked():
    ids, _, leaves = batch("gelu", True)
    leaves = [t.requires_grad_() for t in leaves]
    x, weights, *parameters = leaves
    context = ep.alone()
    numbers = (name_of(context), EXPERTS, "gelu", [], None)
    opcheck(torch.ops.expar.visit_experts.default, (x, ids, weights, *parameters, *numbers))

    def body(x):
        out = ep.visit_experts(x, ids, weights, *parameters, context=context, experts=EXPERTS, activation="gelu")
        return 2 * out

    compiled = torch.compile(body, fullgraph=True)(x)
    (wanted,) = torch.autograd.grad(body(x).sum(), x)
    assert compiled.equal(body(x))
    assert torch.autograd.grad(compiled.sum(), x)[0].equal(wanted)


def test_what_a_pass_keeps_goes_with_its_graph():
    ids, dout, leaves = batch("gelu", True)
    x, weights, *parameters = (t.requires_grad_() for t in leaves)
    gc.collect()
    before = live_states()
    out = ep.visit_experts(x, ids, weights, *parameters, context=ep.alone(), experts=EXPERTS, activation="gelu")
    assert live_states() == before + 1
    out.backward(dout, retain_graph=True)
    first, x.grad = x.grad, None
    out.backward(dout)
    assert first.equal(x.grad)
    del out
    gc.collect()
    assert live_states() == before


def test_what_does_not_fit_is_named():
    ids, _, (x, weights, up, down, up_bias, down_bias) = batch("gelu", True)

    def call(*parameters, activation="gelu"):
        ep.visit_experts(x, ids, weights, *parameters, context=ep.alone(), experts=EXPERTS, activation=activation)

    with pytest.raises(expar.BadArgument, match=r"up is \[4, 8, 16\], should be \[5, 8, 16\]: this rank has 5 experts"):
        call(up[:4], down)
    with pytest.raises(expar.BadArgument, match=r"up is \[5, 8, 16\], should be \[5, 16, 16\]"):
        call(up, down, activation="swiglu")
    with pytest.raises(expar.BadArgument, match=r"down_bias is \[5, 15\]"):
        call(up, down, up_bias, down_bias[:, 1:])
    with pytest.raises(expar.BadArgument, match="both biases or neither"):
        call(up, down, up_bias)
    with pytest.raises(expar.BadArgument, match="tanh"):
        call(up, down, activation="tanh")
    with pytest.raises(expar.BadArgument, match="down is torch.float64, x is f32"):
        call(up, down.double())
    with pytest.raises(expar.BadArgument, match=r"x is \[12, 16\], down \[5, 16\]; should be \[T, H\] and \[L, H, F\]"):
        call(up, down[..., 0])


def test_what_one_rank_hands_in_wrongly_all_are_told_and_go_on():
    ids, _, (x, weights, up, down) = batch("gelu", False)

    def body(context):
        def call(up, down, **changes):
            parameters = mine(up, context), mine(down, context)
            where = {"context": context, "experts": EXPERTS, "activation": "gelu", **changes}
            return ep.visit_experts(x, ids, weights, *parameters, **where)

        def refused(match, *changes, error=expar.BadArgument, own=expar.BadArgument, **others):
            wrong = context.rank == 1
            with pytest.raises(own if wrong else error, match=match):
                call(*(changes if wrong else (up, down)), **(others if wrong else {}))
            assert call(up, down).shape == x.shape

        refused(r"^rank 1: .*down \[3, 16\]; should be", up, down[..., 0])
        refused("out of range", up, down, error=expar.Internal, own=IndexError, first_experts=[0])

    on_ranks(2, body, timeout=5)
