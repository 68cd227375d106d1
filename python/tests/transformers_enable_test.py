"""What expar.transformers.enable takes, what it does to a model, and what it refuses."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from processes import on_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    use_experts_implementation,
)

sys.path.append(os.path.join(os.path.dirname(__file__), "../../tests/python"))

from families import FAMILIES, HIDDEN, INNER, TOPK, VOCABULARY, random_model

import expar
import expar.torch as ep
import expar.transformers as et
from expar.transformers.experts import find_experts
from expar.transformers.forward import travel

TOKENS, EXPERTS = 10, 5


def routes(experts, topk=TOPK, tokens=TOKENS):
    g = torch.Generator().manual_seed(5)
    ids = torch.rand(tokens, experts, generator=g).argsort(1)[:, :topk]
    return torch.randn(tokens, HIDDEN, generator=g), ids, torch.rand(tokens, topk, generator=g)


def part(tensor, rank, ranks):
    return tensor[len(tensor) * rank // ranks : len(tensor) * (rank + 1) // ranks]


def sequences(rank=0, ranks=1):
    return part(torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(1)), rank, ranks)


def first_experts(model):
    return next(module for _, module in find_experts(model))


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


# Whatever goes through the registry


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


# Refusals


def refused(match, model, *arguments):
    with pytest.raises(expar.BadArgument, match=match):
        et.enable(model, *arguments)


def alone_refusals():
    tiny = LlamaConfig(hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=1, vocab_size=8)
    refused("LlamaForCausalLM has no experts that expar knows", LlamaForCausalLM(tiny))
    half = random_model("Qwen3Moe").half()
    refused(r"layers.0.mlp.experts.gate_up_proj of Qwen3MoeExperts is torch.float16, .*dtype=torch.bfloat16", half)
    odd = random_model("Qwen3Moe")
    first_experts(odd).norm = nn.LayerNorm(3)
    refused(r"experts.norm.bias of Qwen3MoeExperts belongs to no single expert", odd)
    short = random_model("Qwen3Moe")
    first_experts(short).down_proj = nn.Parameter(torch.ones(3, HIDDEN, INNER))
    refused(r"down_proj of Qwen3MoeExperts is \[3, 40, 33\], should hold all 7 experts", short)
    del first_experts(short).down_proj
    refused(r"down_proj of Qwen3MoeExperts is missing", short)
    theirs = random_model("Qwen3Moe")
    first_experts(theirs)._is_expert_parallel = True
    refused("in transformers' own expert parallelism", theirs)

    enabled = et.enable(random_model("Qwen3Moe"))
    other = type(enabled)(enabled.config)
    with pytest.raises(expar.BadArgument, match="has not been enabled"):
        other(torch.arange(4)[None])

    ALL_EXPERTS_FUNCTIONS.register("expar", batched_mm_experts_forward)
    refused("batched_mm_experts_forward.*not ours", random_model("Qwen3Moe"))


def test_what_cannot_be_enabled_is_refused_by_name():
    on_processes(1, alone_refusals)


def refusals_together():
    context = ep.context()
    model = et.enable(random_model("Mixtral"))
    refused("is part . of 2 of the experts already, and now should be part 0 of 1", model, ep.alone())
    module = first_experts(model)
    x, ids, weights = routes(module.num_experts)
    if context.rank == 1:
        ids[2, 1] = module.num_experts  # as transformers' own expert parallelism marks what is elsewhere
    with pytest.raises(expar.BadArgument, match=r"rank 1: .*ids\[2,1\] = 7") as error:
        module(x, ids, weights)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ep", "tp"))
    refused("slices experts along tp", random_model("Mixtral"), mesh)
    return error.value.rank


def dtype_refusals():
    context = ep.context()
    ids = sequences(context.rank, context.size)
    for family in ("Qwen3Moe", "GptOss", "Llama4"):
        model = et.enable(random_model(family))
        wanted = "rank 1: .*layers.0.*experts of .*Experts is to compute in torch.float16, .*: "
        with torch.autocast("cpu", torch.float16 if context.rank == 1 else torch.bfloat16):
            with pytest.raises(expar.BadArgument, match=wanted + "autocast to torch.bfloat16"):
                model(ids)
        if context.rank == 1:
            model.half()
        with pytest.raises(expar.BadArgument, match=wanted + r"call model.to\(torch.bfloat16\)"):
            model(ids)
        model.bfloat16()(ids)


def test_a_dtype_of_one_rank_that_is_not_computed_with_is_refused_on_all():
    on_processes(2, dtype_refusals)


def test_an_error_of_one_rank_is_raised_on_all():
    assert on_processes(2, refusals_together) == [1, 1]


def refused_by_one():
    """Rank 1 has something wrong in its last layer."""
    model = random_model("Qwen3Moe")
    if ep.context().rank == 1:
        list(find_experts(model))[-1][1].half()
    shapes = [p.shape for p in model.parameters()]
    refused(r"rank 1: .*gate_up_proj of Qwen3MoeExperts is torch.float16", model)
    none = nn.Linear(1, 1) if ep.context().rank == 1 else model.float()
    refused("rank 1: .*Linear has no experts that expar knows", none)
    return shapes == [p.shape for p in model.parameters()] and not hasattr(first_experts(model), "expar")


def test_what_one_rank_refuses_is_refused_on_all_and_changes_nothing():
    assert on_processes(2, refused_by_one) == [True, True]


class Adapted(nn.Module):
    """Experts with an adapter, as PEFT's target_parameters wraps them."""

    def __init__(self, experts):
        super().__init__()
        self.base_layer = experts
        self.lora_A = nn.Linear(HIDDEN, 2)


class Scaled(nn.Module):
    """A parametrization."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, w):
        return self.scale * w


def adapted(model, way):
    mlp = model.model.layers[1].mlp
    if way == "wrapper":
        mlp.experts = Adapted(mlp.experts)
    else:
        nn.utils.parametrize.register_parametrization(mlp.experts, "down_proj", Scaled())
    return model


def adapter_refusals():
    for way, name in (("wrapper", "lora_A.weight"), ("parametrization", "parametrizations.down_proj")):
        wanted = rf"layers.1.mlp.experts.{name}.* changes the weights of the experts model.layers.1.mlp.experts"
        refused(wanted, adapted(random_model("Qwen3Moe"), way))
        model = adapted(et.enable(random_model("Qwen3Moe")), way)
        for use in (ep.average_gradients, ep.distributed_data_parallel, ep.fully_shard):
            with pytest.raises(expar.BadArgument, match=wanted):
                use(model)
    elsewhere = et.enable(random_model("Qwen3Moe"))
    elsewhere.lm_head = Adapted(elsewhere.lm_head)
    assert any("experts" in name for name, _, _ in ep.expert_parameters(elsewhere))


def test_adapters_of_experts_are_refused_before_and_after():
    on_processes(2, adapter_refusals)


@pytest.mark.parametrize("version", ["4.57.1", None])
def test_a_release_that_is_not_supported_says_what_to_type(version, tmp_path):
    folder = tmp_path / "transformers"
    folder.mkdir()
    (folder / "__init__.py").write_text(f"__version__ = '{version}'" if version else "raise ImportError('none')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", "import expar.transformers"],
        env=dict(os.environ, PYTHONPATH=path), capture_output=True, text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: expar.transformers needs transformers 5.0 or newer")
    assert "pip install -U 'transformers>=5.0'" in last and (version or "") in last
