"""What expar.transformers refuses, by name and on every rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from processes import on_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward
from transformers_samples import HIDDEN, first_experts, routes, sequences

from families import INNER, random_model

import expar
import expar.torch as ep
import expar.transformers as et
from expar.transformers.experts import find_experts


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
