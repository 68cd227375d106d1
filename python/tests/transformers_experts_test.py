"""Experts of any layout, gate and activation that transformers' registry allows, once enabled: its numbers, on any ranks."""

from __future__ import annotations

import pytest
import torch
from processes import on_processes
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation
from transformers_samples import EXPERTS, HIDDEN, TOKENS, part, routes

from families import INNER

import expar
import expar.torch as ep
import expar.transformers as et


def experts_of_its_own(act="silu", gate=None, **flags):
    """A module as transformers' models have them."""
    gated, bias, transposed = flags.get("has_gate", True), flags.get("has_bias"), flags.get("is_transposed")

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = EXPERTS
            up = ("gate_up_proj", 2 * INNER) if gated else ("up_proj", INNER)
            for name, rows, columns in ((*up, HIDDEN), ("down_proj", HIDDEN, INNER)):
                shape = (columns, rows) if transposed else (rows, columns)
                self.register_parameter(name, nn.Parameter(0.3 * torch.randn(EXPERTS, *shape)))
                if bias:
                    self.register_parameter(f"{name}_bias", nn.Parameter(0.3 * torch.randn(EXPERTS, rows)))
            self.act_fn = ACT2FN[act]

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)

    if gate:
        Experts._apply_gate = gate
    config = Qwen3MoeConfig()
    config._experts_implementation = "eager"
    torch.manual_seed(4)
    return use_experts_implementation(Experts, **flags)(config)


def interleaved(self, pre):
    return torch.tanh(pre[..., ::2]) * pre[..., 1::2]


def interleaved_by_name(self, pre):
    return self.act_fn(pre[..., ::2]) * pre[..., 1::2]


KINDS = [
    dict(),
    dict(act="gelu"),
    dict(act="tanh"),
    dict(act="quick_gelu", has_bias=True),
    dict(is_transposed=True),
    dict(is_transposed=True, has_bias=True, act="gelu_new"),
    dict(has_gate=False, act="relu2"),
    dict(has_gate=False, act="silu", has_bias=True),
    dict(has_gate=False, act="gelu", is_transposed=True),
    dict(has_gate=False, act="mish"),
    dict(gate=interleaved, is_concatenated=False),
    dict(gate=interleaved_by_name, is_concatenated=False, is_transposed=True, has_bias=True),
]


def visit(module, rank, ranks):
    x, ids, weights = (part(t, rank, ranks) for t in routes(EXPERTS))
    x.requires_grad_(), weights.requires_grad_()
    out = module(x, ids, weights)
    (out * torch.linspace(0, 1, HIDDEN)).sum().backward()
    return out.detach(), x.grad, weights.grad, {name: p.grad for name, p in module.named_parameters()}


def visits_of_all_kinds():
    context = ep.context()
    return [visit(et.enable(experts_of_its_own(**kind)), context.rank, context.size) for kind in KINDS]


def test_experts_of_any_layout_and_gate_give_what_transformers_gives():
    found = on_processes(2, visits_of_all_kinds)
    for i, kind in enumerate(KINDS):
        wanted = visit(experts_of_its_own(**kind), 0, 1)
        got = [torch.cat([rank[i][j] for rank in found]) for j in range(3)]
        for name, gradient in wanted[3].items():
            got.append(torch.cat([rank[i][3][name] for rank in found]))
        for one, other in zip(got, [*wanted[:3], *wanted[3].values()]):
            # Sums of some hundreds of products in f32, in another order.
            torch.testing.assert_close(one, other, rtol=0, atol=200 * 2**-24 * other.abs().max(), msg=str(kind))


def bytes_of_all_kinds():
    context, found = ep.context(), []
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            module = et.enable(experts_of_its_own(**kind).to(dtype))
            x, ids, weights = (part(t, context.rank, context.size) for t in routes(EXPERTS))
            x = x.to(dtype).requires_grad_()
            out = module(x, ids, weights)
            (out * torch.linspace(0, 1, HIDDEN)).sum().backward()
            found.append((out.detach(), x.grad, *(p.grad for p in module.parameters())))
    return found


def test_experts_of_any_layout_and_gate_give_the_same_bytes_on_any_number_of_ranks():
    (wanted,) = on_processes(1, bytes_of_all_kinds)
    for ranks in (2, 3):
        for i, rows in enumerate(zip(*on_processes(ranks, bytes_of_all_kinds))):
            for got, one in zip(map(torch.cat, zip(*rows)), wanted[i]):
                assert torch.equal(got, one), (ranks, KINDS[i % len(KINDS)])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.get("act") in ("mish", "tanh") or "gate" in kind])
def test_threads_of_torch_change_no_bytes(kind):
    module = et.enable(experts_of_its_own(**kind), ep.alone())
    x, ids, weights = routes(EXPERTS, tokens=1100)  # 3300 rows, of 33 or 66 columns: more than torch gives one thread
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(1)
            wanted = torch.cat([module(*(t[at] for t in (x, ids, weights))) for at in (slice(7), slice(7, None))])
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(module(x, ids, weights), wanted), count
    finally:
        torch.set_num_threads(threads)


def with_slots_left_out():
    module = et.enable(experts_of_its_own())
    x, ids, weights = routes(EXPERTS)
    left_out = ids.clone()
    left_out[:, 0] = -1
    for_all = torch.zeros(TOKENS, EXPERTS).scatter(1, ids, weights)
    with pytest.raises(expar.BadArgument, match=r"weights"):
        module(x, ids, for_all)
    return torch.equal(module(x, left_out, weights), module(x, ids, weights * torch.tensor([0.0, 1, 1])))


def test_slots_may_be_left_out_and_weights_of_all_experts_are_refused():
    assert on_processes(1, with_slots_left_out) == [True]
