"""What expar.transformers.enable does to a model, and what the model does then."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from processes import on_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig
from transformers_samples import first_experts, part, routes, sequences

from families import FAMILIES, VOCABULARY, random_model

import expar.torch as ep
import expar.transformers as et
from expar.transformers.forward import travel


# bf16


def in_bf16():
    """Each family's experts on this rank's part of the tokens."""
    context, found = ep.context(), {}
    for family in FAMILIES:
        module = first_experts(et.enable(random_model(family).bfloat16()))
        x, ids, weights = (part(t, context.rank, context.size) for t in routes(module.num_experts))
        with torch.no_grad():
            found[family] = weighed(module, x.bfloat16(), ids, weights.bfloat16())
    return found


def weighed(module, x, ids, weights):
    """Llama 4's experts take no ids, but every token as weighed for each of them."""
    if type(module).__name__ != "Llama4TextExperts":
        return module(x, ids, weights)
    if hasattr(module, "expar"):
        return travel(module, x, ids, weights.float(), before=True)
    for_all = torch.zeros(len(x), module.num_experts).scatter(1, ids, weights)
    return module((for_all.T[:, :, None] * x).flatten(0, 1)).view(module.num_experts, *x.shape).sum(0)


def test_experts_compute_in_bf16_as_in_f32_but_for_roundings():
    found = on_processes(2, in_bf16)
    for family in found[0]:
        module = first_experts(random_model(family).bfloat16().float())
        x, ids, weights = routes(module.num_experts)
        with torch.no_grad():
            wanted = weighed(module, x.bfloat16().float(), ids, weights.bfloat16().float())
        got = torch.cat([rank[family] for rank in found])
        assert got.dtype == torch.bfloat16
        # 2^-9 of a number's size where the up product, its bias, the gate, the down product, its bias and the sum are
        # rounded; of gate and up the errors multiply.
        assert (got.float() - wanted).abs().max() <= 8 * 2**-9 * wanted.abs().max(), family


def under_autocast():
    module = first_experts(et.enable(random_model("Qwen3Moe")))
    x, ids, weights = routes(module.num_experts)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, ids, weights)
    out.sum().backward()
    return out.dtype, module.down_proj.grad.dtype, (out - module(x, ids, weights)).abs().max() > 1e-4


def test_under_autocast_experts_multiply_in_bf16():
    assert on_processes(1, under_autocast) == [(torch.float32, torch.float32, True)]


# Ranks without tokens, and without experts


def without_tokens():
    """All tokens are rank 1's; the other ranks take part."""
    context, found = ep.context(), []
    for family in ("Mixtral", "GptOss"):
        module = first_experts(et.enable(random_model(family)))
        given = routes(module.num_experts)
        x, ids, weights = given if context.rank == 1 else (t[:0] for t in given)
        out = module(x.requires_grad_(), ids, weights)
        out.sum().backward()
        found.append((out.detach(), x.grad, module.down_proj.grad))
    return found


def test_a_rank_without_tokens_takes_part():
    found = on_processes(3, without_tokens)
    for i, family in enumerate(("Mixtral", "GptOss")):
        module = first_experts(random_model(family))
        x, ids, weights = routes(module.num_experts)
        out = module(x.requires_grad_(), ids, weights)
        out.sum().backward()
        for j, wanted in enumerate((out.detach(), x.grad, module.down_proj.grad)):
            got = torch.cat([rank[i][j] for rank in found])
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max())


def with_a_token_that_does_not_count():
    """transformers' attention takes no empty batch."""
    ids = sequences()
    model = et.enable(random_model("Llama4"))
    if ep.context().rank == 1:
        model(ids, labels=ids).loss.backward()
    else:
        (0 * model(ids[:1, :1]).logits.sum()).backward()
    return first_experts(model).down_proj.grad


def test_a_rank_whose_data_are_used_up_hands_in_a_token_that_does_not_count():
    ids = sequences()
    model = random_model("Llama4")
    model(ids, labels=ids).loss.backward()
    wanted = first_experts(model).down_proj.grad
    got = torch.cat(on_processes(3, with_a_token_that_does_not_count))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max())


def without_experts():
    context = ep.context()
    model = et.enable(random_model("Mixtral", num_local_experts=2, num_experts_per_tok=2))
    module = first_experts(model)
    x, ids, weights = (part(t, context.rank, context.size) for t in routes(2, 2))
    out = module(x, ids, weights)
    out.sum().backward()
    return out.detach(), module.down_proj.shape[0], module.down_proj.grad


def test_a_rank_without_experts_takes_part():
    found = on_processes(3, without_experts)
    module = first_experts(random_model("Mixtral", num_local_experts=2, num_experts_per_tok=2))
    out = module(*routes(2, 2))
    out.sum().backward()
    assert [count for _, count, _ in found] == [0, 1, 1]
    torch.testing.assert_close(torch.cat([o for o, _, _ in found]), out)
    torch.testing.assert_close(torch.cat([g for _, _, g in found]), module.down_proj.grad, rtol=1e-4, atol=1e-5)


# Around a model


def wrapped(way):
    """Gradients of the mean of the ranks' losses, where ``way`` sees to the averaging."""
    context = ep.context()
    model = et.enable(random_model("Qwen3Moe"))
    experts = {name for name, _, _ in ep.expert_parameters(model)}
    if way == "ddp":
        run = ep.distributed_data_parallel(model)
    else:
        for layer in model.model.layers:
            ep.fully_shard(layer)
        run = ep.fully_shard(model)
    ids = sequences(context.rank, context.size)
    run(ids, labels=ids).loss.backward()
    norm = ep.clip_gradients(model, 1e9)
    grads = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()}
    return grads, experts, norm


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_within_ddp_and_fsdp_gradients_are_those_of_the_mean_loss(way):
    found = on_processes(2, wrapped, way)
    model = random_model("Qwen3Moe")
    ids = sequences()
    model(ids, labels=ids).loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    for name, p in model.named_parameters():
        parts = [rank[0][name] for rank in found]
        got = torch.cat(parts) if name in found[0][1] else parts[0]
        torch.testing.assert_close(got, p.grad, rtol=0, atol=1e-5 * p.grad.abs().max(), msg=name)
    torch.testing.assert_close(found[0][2], norm, rtol=1e-5, atol=0)


def with_replicas():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model = et.enable(random_model("Mixtral"), mesh)
    ids = sequences(mesh.get_rank(), 4)
    model(ids, labels=ids).loss.backward()
    ep.average_gradients(model)
    return first_experts(model).down_proj.grad, model.lm_head.weight.grad


def test_on_a_mesh_experts_have_replicas():
    found = on_processes(4, with_replicas)
    model = random_model("Mixtral")
    ids = sequences()
    model(ids, labels=ids).loss.backward()
    wanted = first_experts(model).down_proj.grad
    for pair in (found[:2], found[2:]):
        got = torch.cat([experts for experts, _ in pair])
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max())


def checkpointed():
    """As Trainer has it by default, and the older way, which begins from an input that wants a gradient."""
    context, gradients = ep.context(), []
    ids = sequences(context.rank, context.size)
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = et.enable(random_model("GptOss")).train()
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    return [all(map(torch.equal, gradients[0], others)) for others in gradients[1:]]


def test_both_ways_of_gradient_checkpointing_give_the_same_bytes():
    assert on_processes(2, checkpointed) == [[True, True]] * 2


def compiled():
    model, ids = et.enable(random_model("Qwen3Moe", num_hidden_layers=1)), sequences(ep.context().rank, 2)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        logits = run(ids).logits
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    return all(map(torch.equal, *found))


def test_torch_compile_takes_a_model_as_one_graph_to_the_same_bytes():
    assert on_processes(2, compiled) == [True, True]


def copied():
    model = et.enable(random_model("Llama4"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
        ids = torch.arange(6)[None]
        same = torch.equal(model(ids).logits, et.enable(model)(ids).logits)
        differs = not torch.equal(model(ids).logits, twin(ids).logits)
    tokens = [m.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape for m in (model, twin)]
    return same, differs, tokens[0] == tokens[1] == (1, 8)


def test_a_copy_has_weights_of_its_own_and_a_second_call_does_nothing():
    assert on_processes(2, copied) == [(True, True, True)] * 2


# generate


WAYS = {
    "static cache": dict(cache_implementation="static"),
    "no cache": dict(use_cache=False),
    "sampling": dict(do_sample=True, top_k=10),
    "beams": dict(num_beams=3),
    "beams in a static cache": dict(num_beams=2, cache_implementation="static"),
}


def generated(model, rank, way):
    """Prompts and completions of lengths that differ per rank."""
    torch.manual_seed(rank)
    ids = torch.randint(VOCABULARY, (2, 3 + 2 * rank))
    more = 4 + 9 * rank
    options = {"do_sample": False, "max_new_tokens": more, "min_new_tokens": more, "pad_token_id": 0, **WAYS[way]}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()


def generated_together(family):
    model, rank = et.enable(random_model(family)), ep.context().rank
    return [generated(model, rank, way) for way in WAYS]


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_a_rank_that_has_its_tokens_takes_part_in_any_way_to_generate(family):
    model = random_model(family)
    for rank, found in enumerate(on_processes(2, generated_together, family)):
        for way, tokens in zip(WAYS, found):
            assert tokens == generated(model, rank, way), way


# Memory


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_given_back():
    """Of 3 x 32 MiB of experts."""
    config = Qwen3MoeConfig(
        num_hidden_layers=1, hidden_size=512, num_experts=16, moe_intermediate_size=1024, vocab_size=64,
        num_attention_heads=4, num_key_value_heads=4, head_dim=8,
    )
    model = type(random_model("Qwen3Moe"))(config)
    ep.context()  # joining takes memory too
    before = resident()
    et.enable(model)
    return before - resident()


@pytest.mark.parametrize("ranks, given_back", [(1, 0), (2, 48), (4, 72)])
def test_the_other_ranks_experts_leave_memory(ranks, given_back):
    for found in on_processes(ranks, memory_given_back):
        assert abs(found - given_back * 2**20) < 2 * 2**20, found / 2**20
