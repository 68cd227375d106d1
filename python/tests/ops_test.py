"""The operators of expar.torch: the same as plain PyTorch, the same bytes on any number of ranks, traced and checked."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck
from ranks import on_ranks

import expar
import expar.torch as ep
from expar.torch.contexts import name_of
from expar.torch.states import live_states

TOKENS, TOPK, EXPERTS, HIDDEN, INNER = 12, 3, 5, 16, 8

torch.set_num_threads(1)


def batch(dtype=torch.float32):
    """The whole batch and all experts; token 3 goes nowhere, token 4 twice to one expert."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(TOKENS, HIDDEN, generator=g).to(dtype)
    ids = torch.randint(-1, EXPERTS, (TOKENS, TOPK), generator=g)
    ids[3], ids[4] = -1, torch.tensor([2, 2, 0])
    weights = torch.rand(TOKENS, TOPK, generator=g)
    up = torch.randn(EXPERTS, INNER, HIDDEN, generator=g).to(dtype)
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=g).to(dtype)
    dout = torch.randn(TOKENS, HIDDEN, generator=g).to(dtype)
    return x, ids, weights, up, down, dout


def mine(tensor, context, of):
    begin, end = (of * r // context.size for r in (context.rank, context.rank + 1))
    return tensor[begin:end].clone().requires_grad_(tensor.is_floating_point())


def moe(x, ids, weights, up, down, context, payload=None):
    sent = ep.dispatch(x, ids, context=context, experts=EXPERTS, payload=payload)
    h = torch.relu(ep.grouped_mm(sent.rows, up, sent.counts, context=context))
    y = ep.grouped_mm(h, down, sent.counts, context=context)
    return ep.combine(y, sent, weights)


def eager(x, ids, weights, up, down):
    out = torch.zeros_like(x)
    for k in range(TOPK):
        for e in range(EXPERTS):
            at = ids[:, k] == e
            out = out + at[:, None] * weights[:, k, None] * (torch.relu(x @ up[e].T) @ down[e].T)
    return out


def step(context, dtype=torch.float32, body=moe):
    """Output and gradients of this rank's part of the batch."""
    x, ids, weights, up, down, dout = batch(dtype)
    leaves = [mine(t, context, n) for t, n in ((x, TOKENS), (weights, TOKENS), (up, EXPERTS), (down, EXPERTS))]
    out = body(leaves[0], mine(ids, context, TOKENS), *leaves[1:], context)
    out.backward(mine(dout, context, TOKENS).detach())
    return [out.detach()] + [leaf.grad for leaf in leaves]


def joined(results):
    return [torch.cat(parts) for parts in zip(*results)]


def test_outputs_and_gradients_are_those_of_plain_pytorch():
    x, ids, weights, up, down, dout = (t.double() if t.is_floating_point() else t for t in batch())
    leaves = [t.requires_grad_() for t in (x, weights, up, down)]
    out = eager(x, ids, *leaves[1:])
    out.backward(dout)
    for wanted, got in zip([out] + [leaf.grad for leaf in leaves], joined(on_ranks(2, step))):
        # Sums of at most HIDDEN products in f32, twice over.
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=4 * HIDDEN * 6e-8 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mapping", [True, False])
def test_bytes_are_the_same_on_any_number_of_ranks(dtype, mapping):
    one = joined(on_ranks(1, lambda c: step(c, dtype)))
    for ranks in (2, 3, 4, 7):
        for a, b in zip(one, joined(on_ranks(ranks, lambda c: step(c, dtype), mapping=mapping))):
            assert a.view(torch.uint8).equal(b.view(torch.uint8))


def test_a_rank_without_tokens_has_gradients_of_nothing():
    def uneven(context):
        x, ids, weights, up, down, _ = batch()
        first = context.rank == 0
        some = slice(0, TOKENS if first else 0)
        leaves = [x[some].clone().requires_grad_(), mine(up, context, EXPERTS), mine(down, context, EXPERTS)]
        moe(leaves[0], ids[some], weights[some], *leaves[1:], context).sum().backward()
        return leaves[0].grad, leaves[1].grad

    results = on_ranks(2, uneven)
    assert results[1][0].shape == (0, HIDDEN) and results[1][1].abs().sum() > 0


def test_weights_may_travel_with_the_rows_instead():
    def travelling(x, ids, weights, up, down, context):
        sent = ep.dispatch(x, ids, weights, context=context, experts=EXPERTS)
        h = torch.relu(ep.grouped_mm(sent.rows, up, sent.counts, context=context))
        y = ep.grouped_mm(h * sent.weights[:, None], down, sent.counts, context=context)
        return ep.combine(y, sent)

    for a, b in zip(joined(on_ranks(2, step)), joined(on_ranks(2, lambda c: step(c, body=travelling)))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_may_lie_transposed(dtype):
    def transposed(x, ids, weights, up, down, context):
        sent = ep.dispatch(x, ids, context=context, experts=EXPERTS)
        up, down = (w.transpose(1, 2).contiguous() for w in (up, down))
        h = torch.relu(ep.grouped_mm(sent.rows, up, sent.counts, context=context, transposed=True))
        y = ep.grouped_mm(h, down, sent.counts, context=context, transposed=True)
        return ep.combine(y, sent, weights)

    one, three, as_ever = (
        joined(on_ranks(ranks, lambda c, body=body: step(c, dtype, body)))
        for ranks, body in ((1, transposed), (3, transposed), (1, moe))
    )
    for a, b, wanted in zip(one, three, as_ever):
        assert a.equal(b)
        # Sums of some tens of products, which may end on either side of a rounding.
        bound = 32 * torch.finfo(dtype).eps * wanted.abs().max()
        assert (a - wanted).abs().max() <= bound


def test_a_payload_rounds_rows_alike_everywhere():
    def rounded(*args):
        return moe(*args, payload="int8")

    one = joined(on_ranks(1, lambda c: step(c, body=rounded)))
    for a, b, exact in zip(one, joined(on_ranks(3, lambda c: step(c, body=rounded))), joined(on_ranks(1, step))):
        assert a.equal(b)
        assert 0 < (a - exact).abs().max() < 0.05 * exact.abs().max()


def test_slices_are_summed_forwards_and_backwards():
    """Two ranks with all tokens and half of each expert's inner dimension."""

    def sliced(context):
        x, ids, weights, up, down, dout = batch()
        alone = context.on(context.communicator.split(context.rank))
        half = slice(context.rank * INNER // 2, (context.rank + 1) * INNER // 2)
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        up, down = up[:, half].clone().requires_grad_(), down[..., half].clone().requires_grad_()
        sent = ep.dispatch(x, ids, context=alone, experts=EXPERTS, slices=context)
        h = torch.relu(ep.grouped_mm(sent.rows, up, sent.counts, context=alone))
        out = ep.combine(ep.grouped_mm(h, down, sent.counts, context=alone), sent, weights)
        out.backward(dout)
        return out.detach(), x.grad, up.grad, down.grad

    (out, dx, up0, down0), (out1, dx1, up1, down1) = on_ranks(2, sliced)
    whole = joined(on_ranks(1, step))
    assert out.equal(out1) and dx.equal(dx1)
    for wanted, got in zip([whole[0], whole[1], whole[3], whole[4]], [out, dx, torch.cat([up0, up1], 1), torch.cat([down0, down1], 2)]):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_sums_and_copies_are_each_others_gradient():
    def both(context):
        x = torch.full((2, 3), 1.0 + context.rank, requires_grad=True)
        y = torch.full((2, 3), 1.0, requires_grad=True)
        total, copy = ep.reduce_over(x, context), ep.copy_over(y, context)
        (total.sum() + (copy * (context.rank + 1)).sum()).backward()
        return total[0, 0].item(), x.grad[0, 0].item(), y.grad[0, 0].item()

    assert on_ranks(3, both) == [(6.0, 1.0, 6.0)] * 3


def test_compiled_graphs_trace_through():
    def compiled(x, ids, weights, up, down, context):
        return torch.compile(moe, fullgraph=True)(x, ids, weights, up, down, context)

    for a, b in zip(joined(on_ranks(1, step)), joined(on_ranks(1, lambda c: step(c, body=compiled)))):
        torch.testing.assert_close(a, b)


@pytest.fixture(scope="module")
def context():
    return expar.Context(expar.init())


def test_opcheck_passes(context):
    x, ids, weights, up, _, _ = batch()
    x, weights, up = x.requires_grad_(), weights.requires_grad_(), up.requires_grad_()
    sent = ep.dispatch(x, ids, weights, context=context, experts=EXPERTS)
    rows = sent.rows.detach().clone().requires_grad_()
    ops = torch.ops.expar
    opcheck(ops.dispatch, (x, ids, weights, name_of(context), EXPERTS, [], None, ""))
    opcheck(ops.dispatch, (x.bfloat16(), ids, None, name_of(context), EXPERTS, [0, EXPERTS], "int8", ""))
    opcheck(ops.combine, (rows, weights, sent.handle, TOKENS))
    opcheck(ops.combine, (rows, None, sent.handle, TOKENS))
    opcheck(ops.grouped_mm, (rows, up, sent.counts, name_of(context)))
    across = up.detach().transpose(1, 2).contiguous().requires_grad_()
    opcheck(ops.grouped_mm, (rows, across, sent.counts, name_of(context), True))
    opcheck(ops.sum_over, (x, name_of(context)))
    opcheck(ops.copy_over, (x, name_of(context)))


def test_gradcheck_passes_in_f32(context):
    """Each operator is linear in each of its inputs, so a difference over a step has no error but rounding: of outputs
    below 64, by a step of 1/16, at most 2 * 64 * 2^-24 * 16 and as much again in the sums."""
    x, ids, weights, up, _, _ = batch()

    def chain(x, weights, up):
        sent = ep.dispatch(x, ids, context=context, experts=EXPERTS)
        return ep.combine(ep.grouped_mm(sent.rows, up, sent.counts, context=context), sent, weights)

    inputs = [t.requires_grad_() for t in (x, weights, up)]
    assert chain(*inputs).abs().max() < 64
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(chain, inputs, eps=2**-4, atol=4 * 64 * 2**-24 * 16, rtol=0)


def test_what_a_pass_keeps_goes_with_its_graph(context):
    x, ids, weights, up, down, _ = batch()
    x.requires_grad_()

    def forward():
        return moe(x, ids, weights, up, down, context)

    gc.collect()
    before = live_states()
    forward()  # never goes backward
    out = forward()
    assert live_states() > before
    out.sum().backward(retain_graph=True)
    first, x.grad = x.grad, None
    out.sum().backward()
    assert first.equal(x.grad)
    del out
    gc.collect()
    assert live_states() == before


def test_a_pass_that_is_over_is_refused(context):
    x, ids, _, _, _, _ = batch()
    sent = ep.dispatch(x, ids, context=context, experts=EXPERTS)
    copy = sent._replace(handle=sent.handle.clone())
    ep.combine(sent.rows, copy)  # the pass is still known
    del sent
    gc.collect()
    with pytest.raises(ValueError, match="this handle's pass is over"):
        ep.combine(copy.rows, copy)


def test_a_program_may_end_with_a_graph_in_its_hands():
    program = """
import torch, expar.torch as ep
layer = ep.MoELayer(8, 8, 4, 2, context=ep.alone())
out = layer(torch.randn(3, 8, requires_grad=True))
sent = ep.dispatch(out, torch.zeros(3, 1, dtype=torch.int32), context=ep.alone(), experts=4)
y = ep.grouped_mm(sent.rows, torch.randn(4, 8, 8), sent.counts, context=ep.alone())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_wrong_inputs_are_refused(context):
    x, ids, weights, up, _, _ = batch()
    with pytest.raises(ValueError, match=r"ids\[0,0\] = 5 is not below num_experts 5"):
        ep.dispatch(x, torch.full_like(ids, 5), context=context, experts=EXPERTS)
    with pytest.raises(ValueError, match="neither f32 nor bf16"):
        ep.dispatch(x.double().to(torch.int32), ids, context=context, experts=EXPERTS)
    sent = ep.dispatch(x, ids, context=context, experts=EXPERTS)
    with pytest.raises(ValueError, match="grouped_mm: x is f32"):
        ep.grouped_mm(sent.rows[1:], up, sent.counts, context=context)
    with pytest.raises(ValueError, match="4 counts for the 5 groups of w"):
        ep.grouped_mm(sent.rows, up, sent.counts[1:], context=context)


@pytest.mark.parametrize("name", ["silu", "swiglu"])
def test_activations_are_pytorchs_and_an_elements_bytes_do_not_depend_on_its_neighbours(name):
    def body(c):
        g = torch.Generator().manual_seed(1)
        pre, dh = torch.randn(9, 14, generator=g), torch.randn(9, 14 if name == "silu" else 7, generator=g)
        whole = pre.clone().requires_grad_()
        h = ep.activate(whole, name, context=c)
        h.backward(dh)
        for rows in (1, 4):
            some = pre[:rows].clone().requires_grad_()
            few = ep.activate(some, name, context=c)
            few.backward(dh[:rows])
            assert torch.equal(few, h[:rows]) and torch.equal(some.grad, whole.grad[:rows])
        exact = pre.double().requires_grad_()
        silu = torch.nn.functional.silu(exact[:, :7])
        (torch.nn.functional.silu(exact) if name == "silu" else silu * exact[:, 7:]).backward(dh.double())
        torch.testing.assert_close(whole.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
        opcheck(torch.ops.expar.activate.default, (whole, name, name_of(c)))
        with pytest.raises(expar.BadArgument, match="should be one of swiglu"):
            ep.activate(whole, "tanh", context=c)

    on_ranks(1, body)


def test_slices_sum_the_gradient_of_the_weights_too():
    def sliced(context):
        x, ids, weights, up, down, dout = batch()
        alone = context.on(context.communicator.split(context.rank))
        half = slice(context.rank * INNER // 2, (context.rank + 1) * INNER // 2)
        weights = weights.clone().requires_grad_()
        sent = ep.dispatch(x, ids, context=alone, experts=EXPERTS, slices=context)
        h = torch.relu(ep.grouped_mm(sent.rows, up[:, half], sent.counts, context=alone))
        ep.combine(ep.grouped_mm(h, down[..., half], sent.counts, context=alone), sent, weights).backward(dout)
        return weights.grad

    first, second = on_ranks(2, sliced)
    assert first.equal(second)
    torch.testing.assert_close(first, joined(on_ranks(1, step))[2], rtol=1e-4, atol=1e-4)


def test_results_and_ids_that_do_not_fit_are_refused(context):
    x, ids, weights, _, _, _ = batch()
    sent = ep.dispatch(x, ids, context=context, experts=EXPERTS)
    for y in (sent.rows[:1], sent.rows[1:], sent.rows.double()):
        with pytest.raises(ValueError, match="row i is the result of"):
            ep.combine(y, sent)
    with pytest.raises(ValueError, match="ids is torch.float32, should be integers"):
        ep.dispatch(x, ids.float(), context=context, experts=EXPERTS)
    with pytest.raises(ValueError, match="not below num_experts"):
        ep.dispatch(x, ids + 2**32, context=context, experts=EXPERTS)


def test_what_pytorch_s_tensors_have_wrong_on_one_rank_all_are_told():
    def body(c):
        x, ids, weights, up, down, _ = batch()
        wrong = c.rank == 1
        sent = ep.dispatch(x, ids, context=c, experts=EXPERTS)
        with pytest.raises(expar.BadArgument, match="^rank 1: .*row i is the result of"):
            ep.combine(sent.rows[1:] if wrong else sent.rows, sent)
        with pytest.raises(expar.BadArgument, match="^rank 1: .*ids is torch.float32, should be integers"):
            ep.dispatch(x, ids.float() if wrong else ids, context=c, experts=EXPERTS)
        held = [mine(w, c, EXPERTS) for w in (up, down)]
        with pytest.raises(expar.BadArgument, match=r"^rank 1: .*up is \[1, 8, 16\], should be \[3, 8, 16\]"):
            up = held[0][:1] if wrong else held[0]
            ep.visit_experts(x, ids, weights, up, held[1], context=c, experts=EXPERTS, activation="gelu")
        assert ep.combine(sent.rows, sent).shape == x.shape

    on_ranks(2, body)



def test_a_graph_keeps_the_layer_and_the_context_that_it_needs():
    x = torch.randn(3, HIDDEN, requires_grad=True)
    ep.MoELayer(HIDDEN, 8, 4, 2, context=ep.alone())(x).sum().backward()

    def product():
        own = expar.Context(ep.alone().communicator)
        return ep.grouped_mm(x, torch.ones(1, 4, HIDDEN), torch.tensor([3]), context=own)

    y = product()
    gc.collect()
    y.sum().backward()
