"""Every family of transformers' Mixture-of-Experts models, expert-parallel on 1, 2 and 4 ranks: as in one process."""

from __future__ import annotations

import functools
import os
import sys

import pytest
import torch
from processes import on_processes

sys.path.append(os.path.join(os.path.dirname(__file__), "../../tests/python"))

from families import EXPERTS, FAMILIES, HIDDEN, INNER, LAYERS, TOPK, VOCABULARY, random_model

import expar.torch as ep
import expar.transformers as et

SEQUENCES, LENGTH, NEW_TOKENS = 4, 6, 12
FAMILY = pytest.mark.parametrize("family", FAMILIES)
RANKS = pytest.mark.parametrize("ranks", [1, 2, 4])

# Additions on the longest way of a number through the model: in each layer the norms, the four projections, the scores
# and sums of attention, the router, up, down and the sum over slots; then norm and head. f32 loses 2^-24 of a number's
# size at each of them, and norms keep the sizes on the way alike.
FORWARD = LAYERS * (2 * HIDDEN + 4 * HIDDEN + HIDDEN + LENGTH + HIDDEN + HIDDEN + INNER + TOPK) + 2 * HIDDEN
# Backward goes the same way again with both factors rounded, and sums over tokens.
BACKWARD = 3 * FORWARD + VOCABULARY + SEQUENCES * LENGTH


def assert_close(found, wanted, additions, what):
    __tracebackhide__ = True
    assert found.shape == wanted.shape, what
    error, bound = (found - wanted).abs().max(), additions * 2.0**-24 * wanted.abs().max()
    assert error <= bound, f"{what}: {error:.3g} apart, should be {bound:.3g} at the most"


def sequences(rank, ranks):
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(3))
    return ids[SEQUENCES * rank // ranks : SEQUENCES * (rank + 1) // ranks]


def step(model, ids):
    """Logits, and the gradients of the sum of the losses of all tokens; gradients that were are dropped."""
    model.zero_grad()
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    ).backward()
    return logits.detach(), gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def completions(model, rank, ranks, end):
    """What each of this rank's sequences becomes, cut to another length, by generate() of its own."""
    found = []
    for i, ids in enumerate(sequences(rank, ranks), SEQUENCES * rank // ranks):
        prompt = ids[None, : LENGTH - i]
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
        )
        found.append(out[0].tolist())
    return found


@functools.cache
def eager(family):
    """Logits, gradients, completions, the token that ends them, and bytes of experts, in one process."""
    model = random_model(family)
    experts = sum(p.nbytes for _, m in et.experts.find_experts(model) for p in m.parameters())
    logits, grads = step(model, sequences(0, 1))
    # What one of the sequences soon gets ends it, and others later.
    end = completions(model, 0, 1, None)[0][LENGTH + 2]
    return logits, grads, completions(model, 0, 1, end), end, experts


def on_rank():
    """The same of every family on this rank, after enable()."""
    context, results = ep.context(), {}
    for family in FAMILIES:
        model = et.enable(random_model(family))
        ids = sequences(context.rank, context.size)
        held = [p for _, p, _ in ep.expert_parameters(model)]
        result = {"experts": [name for name, _, _ in ep.expert_parameters(model)], "bytes": sum(p.nbytes for p in held)}
        result["logits"], result["gradients"] = step(model, ids)
        ep.average_gradients(model)
        result["means"] = gradients(model)
        model.gradient_checkpointing_enable()
        model.train()
        result["checkpointed"] = step(model, ids)[1]
        model.eval()
        result["completions"] = completions(model, context.rank, context.size, eager(family)[3])
        results[family] = result
    return results


@functools.cache
def results(ranks):
    for family in FAMILIES:
        eager(family)  # before the ranks are forked
    return on_processes(ranks, on_rank)


def of_all_ranks(ranks, family, kind):
    """Experts' gradients of all ranks; of the others the sum over ranks."""
    found = [rank[family] for rank in results(ranks)]
    for name in found[0][kind]:
        parts = [rank[kind][name] for rank in found]
        yield name, torch.cat(parts) if name in found[0]["experts"] else torch.stack(parts).sum(0)


@RANKS
@FAMILY
def test_logits_are_those_of_one_process(family, ranks):
    found = torch.cat([rank[family]["logits"] for rank in results(ranks)])
    assert_close(found, eager(family)[0], FORWARD, "logits")


@RANKS
@FAMILY
@pytest.mark.parametrize("kind", ["gradients", "checkpointed"])
def test_gradients_are_those_of_the_sum_of_all_ranks_losses(family, ranks, kind):
    found, wanted = dict(of_all_ranks(ranks, family, kind)), eager(family)[1]
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, BACKWARD, name)


@RANKS
@FAMILY
def test_averaged_gradients_are_those_of_the_mean_loss(family, ranks):
    found = [rank[family] for rank in results(ranks)]
    for name, gradient in eager(family)[1].items():
        parts = [rank["means"][name] for rank in found]
        if name in found[0]["experts"]:
            parts = [torch.cat(parts)]
        for part in parts:
            assert_close(part, gradient / ranks, BACKWARD, name)


@RANKS
@FAMILY
def test_generate_gives_the_tokens_of_one_process_wherever_ranks_end(family, ranks):
    found = [tokens for rank in results(ranks) for tokens in rank[family]["completions"]]
    assert found == eager(family)[2]
    assert len({len(tokens) + i for i, tokens in enumerate(found)}) > 1


@RANKS
@FAMILY
def test_each_rank_keeps_its_experts_alone(family, ranks):
    held, whole = [rank[family]["bytes"] for rank in results(ranks)], eager(family)[4]
    assert sum(held) == whole
    assert max(held) <= whole * -(-EXPERTS // ranks) / EXPERTS
