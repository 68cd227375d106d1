"""from_pretrained, of this rank's experts alone, and save_pretrained, of all ranks': files are those of one process."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import sys

import pytest
import torch
from processes import on_processes
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, modeling_utils
from transformers.utils import logging

sys.path.append(os.path.join(os.path.dirname(__file__), "../../tests/python"))

from families import FAMILIES, VOCABULARY, random_model

import expar
import expar.torch as ep
import expar.transformers as et

FAMILY = pytest.mark.parametrize("family", FAMILIES)
IDS = torch.arange(12).reshape(2, 6) % VOCABULARY
# How a checkpoint is saved: in one file, in many, with the names and shapes that the model's parameters have.
WAYS = {"whole": {}, "sharded": {"max_shard_size": "60KB"}, "fused": {"save_original_format": False}}

logging.set_verbosity_error()
logging.disable_progress_bar()


class CountedFile:
    """In the place of safetensors' safe_open: counts the bytes that are read."""

    read = 0
    open = modeling_utils.safe_open

    def __init__(self, *args, **kwargs):
        self._file = CountedFile.open(*args, **kwargs)
        self.keys, self.metadata, self.__exit__ = self._file.keys, self._file.metadata, self._file.__exit__

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def get_slice(self, key):
        return CountedSlice(self._file.get_slice(key))


class CountedSlice:
    def __init__(self, part):
        self._part = part
        self.get_shape, self.get_dtype = part.get_shape, part.get_dtype

    def __getitem__(self, index):
        tensor = self._part[index]
        CountedFile.read += tensor.nbytes
        return tensor


def loaded(folder, **kwargs):
    """A model, and the bytes that were read for it."""
    CountedFile.read = 0
    modeling_utils.safe_open = CountedFile
    model = et.from_pretrained(AutoModelForCausalLM, folder, **kwargs).eval()
    modeling_utils.safe_open = CountedFile.open
    return model, CountedFile.read


def enabled(folder, **kwargs):
    """The same by way of the whole model."""
    return et.enable(AutoModelForCausalLM.from_pretrained(folder, **kwargs)).eval()


def assert_same(found, wanted):
    assert_same_tensors(found.state_dict(), wanted.state_dict())


def assert_same_tensors(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def on_rank(folder, out):
    """Loads each checkpoint and saves it again, asserting on the way; bytes read and held by family and way."""
    counts = {}
    for family in FAMILIES:
        for way, kwargs in WAYS.items():
            model, read = loaded(f"{folder}/{family}/{way}")
            held = sum(t.nbytes for t in model.state_dict().values())
            experts = sum(p.nbytes for _, p, _ in ep.expert_parameters(model))
            counts[family, way] = read, held, experts
            if way == "whole":
                whole = enabled(f"{folder}/{family}/whole")
                assert torch.equal(model(IDS).logits, whole(IDS).logits)
            assert_same(model, whole)
            model.save_pretrained(f"{out}/{family}/{way}", **kwargs)
    return counts


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """FAMILY/WAY for each, saved by transformers in one process."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        random_model(family).save_pretrained(folder / family / "drawn")
        model = AutoModelForCausalLM.from_pretrained(folder / family / "drawn")
        for way, kwargs in WAYS.items():
            model.save_pretrained(folder / family / way, **kwargs)
    return folder


@pytest.fixture(scope="module")
def on_3(checkpoints, tmp_path_factory):
    """Where 3 ranks have saved the same, and what each has read and held. No family's experts are a multiple of 3."""
    out = tmp_path_factory.mktemp("saved")
    return out, on_processes(3, on_rank, checkpoints, out)


@FAMILY
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_reads_and_holds_its_experts_and_no_others(on_3, family, way):
    _, ranks = on_3
    all_experts = sum(rank[family, way][2] for rank in ranks)
    for read, held, experts in (rank[family, way] for rank in ranks):
        assert read == held
        assert 0 < experts < 0.5 * all_experts


@FAMILY
@pytest.mark.parametrize("way", WAYS)
def test_ranks_save_together_the_bytes_that_one_process_saves(checkpoints, on_3, family, way):
    expected, found = checkpoints / family / way, on_3[0] / family / way
    if way == "sharded":  # transformers keeps together in a file what were views of one tensor, we need not
        wanted, got = all_tensors(expected), all_tensors(found)
        assert wanted.keys() == got.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
        assert index(found)["metadata"] == index(expected)["metadata"]
        assert max(os.path.getsize(found / name) for name in os.listdir(found)) < 80_000
        return
    assert sorted(os.listdir(expected)) == sorted(os.listdir(found))
    for name in os.listdir(expected):
        assert filecmp.cmp(expected / name, found / name, shallow=False), name


def index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def all_tensors(folder):
    """Of a checkpoint in several files, found as its index says."""
    return {
        name: load_file(folder / file)[name] for name, file in index(folder)["weight_map"].items()
    }


def on_two(checkpoints, saved_by_3):
    """What 3 ranks have saved, other files and dtypes; then what cannot be loaded."""
    for family in FAMILIES:
        assert_same(loaded(f"{saved_by_3}/{family}/whole")[0], enabled(f"{checkpoints}/{family}/whole"))
    for family in ("DeepseekV3", "GptOss"):
        for dtype in (torch.bfloat16, "auto"):
            folder = f"{checkpoints}/{family}/whole"
            assert_same(loaded(folder, dtype=dtype)[0], enabled(folder, dtype=dtype))
        assert_same(loaded(f"{checkpoints}/{family}/bin")[0], enabled(folder))
    model, info = et.from_pretrained(
        AutoModelForCausalLM, f"{checkpoints}/Qwen3Moe/sharded", output_loading_info=True
    )
    assert not any(info.values())
    with pytest.raises(expar.BadArgument, match=r"experts.down_proj in the checkpoint is \[7, 33, 40\], should hold 9"):
        et.from_pretrained(AutoModelForCausalLM, f"{checkpoints}/GptOss/whole", num_local_experts=9)
    with pytest.raises(expar.BadArgument, match="has no experts that expar knows"):
        et.from_pretrained(AutoModelForCausalLM, f"{checkpoints}/dense")
    # Whatever happened, transformers is as it was.
    assert_same(AutoModelForCausalLM.from_pretrained(f"{checkpoints}/GptOss/whole"), random_model("GptOss"))


def test_what_some_ranks_have_saved_other_ranks_load(checkpoints, on_3):
    for family in ("DeepseekV3", "GptOss"):
        folder = checkpoints / family / "bin"
        shutil.copytree(checkpoints / family / "whole", folder)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(checkpoints / "dense")
    on_processes(2, on_two, checkpoints, on_3[0])


def refused(folder):
    with pytest.raises(expar.BadArgument) as raised:
        et.from_pretrained(AutoModelForCausalLM, folder)
    return raised.value.message


@pytest.mark.parametrize("lost", ["0", "3", "6"])
def test_no_expert_takes_the_place_of_one_that_the_checkpoint_lacks(checkpoints, tmp_path, lost):
    """Wherever it is, every rank says so, those too that would not have read it."""
    folder = tmp_path / "lacking"
    shutil.copytree(checkpoints / "Qwen3Moe/whole", folder)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.experts.{lost}.up_proj.weight"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for text in on_processes(3, refused, folder):
        assert text == f"the checkpoint lacks {name}: the model has experts 0 to 6"


def test_a_checkpoint_with_more_experts_than_the_model_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "Qwen3Moe/whole", tmp_path / "more")
    config = AutoConfig.from_pretrained(tmp_path / "more")
    config.num_experts = 6
    config.save_pretrained(tmp_path / "more")
    for text in on_processes(2, refused, tmp_path / "more"):
        assert "the checkpoint has model.layers.0.mlp.experts.6." in text and text.endswith("the model has experts 0 to 5")


def quantized(folder):
    """What 2 ranks have of it, and how much they read; saved again."""
    model, read = loaded(folder)
    assert_same(model, enabled(folder))
    error, text = (expar.Unsupported, "was MXFP4") if ep.context().rank == 0 else (expar.Internal, "rank 0 could not")
    with pytest.raises(error, match=text):
        model.save_pretrained(f"{folder}/refused")
    assert not os.path.exists(f"{folder}/refused")
    model.save_pretrained(f"{folder}/saved", save_original_format=False)
    torch.distributed.barrier()  # all have what rank 0 has written
    loaded(f"{folder}/saved")[0].save_pretrained(f"{folder}/again")
    return read, {name for name, _, _ in ep.expert_parameters(model)}, model.state_dict()


def test_experts_in_mxfp4_are_read_by_rows_and_become_bf16(tmp_path):
    """As openai/gpt-oss-20b is stored: 32 numbers in 16 bytes, with a scale for each 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
    random_model("GptOss", **sizes).to(torch.bfloat16).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}
    (tmp_path / "config.json").write_text(json.dumps(config))

    wanted = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    ranks = on_processes(2, quantized, tmp_path)
    for name, tensor in wanted.items():
        assert tensor.dtype == torch.bfloat16
        parts = [state[name] for _, _, state in ranks]
        assert torch.equal(torch.cat(parts) if name in ranks[0][1] else parts[0], tensor), name
    dense = sum(tensor.nbytes for name, tensor in tensors.items() if "experts" not in name)
    assert sum(read - dense for read, _, _ in ranks) == sum(t.nbytes for n, t in tensors.items() if "experts" in n)
    for saved in ("saved", "again"):
        assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / saved).state_dict(), wanted)


def odd_saves(checkpoints, out):
    model = et.from_pretrained(AutoModelForCausalLM, f"{checkpoints}/Mixtral/whole")
    model.save_pretrained(f"{out}/nobody", is_main_process=False)
    assert not os.path.exists(f"{out}/nobody")
    model.save_pretrained(f"{out}/given", state_dict={name: 2 * t for name, t in model.state_dict().items()})
    with open(f"{out}/file", "w"):
        pass
    here, there = (NotADirectoryError, ""), (expar.Internal, "rank 0 could not write the checkpoint")
    error, text = here if ep.context().rank == 0 else there
    with pytest.raises(error, match=text):
        model.save_pretrained(f"{out}/file/folder")
    with pytest.raises(expar.Unsupported, match="leave out distributed_checkpoint"):
        model.save_pretrained(f"{out}/parts", distributed_checkpoint=True)
    # Every rank goes on.
    model.save_pretrained(f"{out}/again")


def test_what_rank_0_cannot_write_every_rank_hears_of(checkpoints, tmp_path):
    on_processes(2, odd_saves, checkpoints, tmp_path)
    wanted = AutoModelForCausalLM.from_pretrained(checkpoints / "Mixtral/whole")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), wanted)
    with torch.no_grad():
        for tensor in wanted.state_dict().values():
            tensor *= 2
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "given"), wanted)


def saved_from(mesh_of, checkpoints, out):
    """The ranks of a mesh are not in PyTorch's order. Only the main process says that it is."""
    mesh = DeviceMesh("cpu", mesh_of, mesh_dim_names=("dp", "ep"))
    model = et.from_pretrained(AutoModelForCausalLM, f"{checkpoints}/Qwen3Moe/whole", context=mesh)
    model.save_pretrained(f"{out}/all")
    model.save_pretrained(f"{out}/main", is_main_process=torch.distributed.get_rank() == 0)
    model.save_pretrained(f"{out}/nobody", is_main_process=torch.distributed.get_rank() != 0)


@pytest.mark.parametrize("mesh", ([[1, 0]], [[1, 0], [3, 2]], [[2, 3], [1, 0]]))
def test_a_model_is_saved_wherever_rank_0_is_in_the_mesh(checkpoints, tmp_path, mesh):
    on_processes(sum(map(len, mesh)), saved_from, mesh, checkpoints, tmp_path)
    expected = checkpoints / "Qwen3Moe/whole"
    for found in ("all", "main"):
        for name in os.listdir(expected):
            assert filecmp.cmp(expected / name, tmp_path / found / name, shallow=False), name
    assert not (tmp_path / "nobody").exists()
