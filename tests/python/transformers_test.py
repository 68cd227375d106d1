"""expar run beside transformers' own MoE blocks, on checkpoints that transformers or expar train has written:
transformers_test.py EXPAR TEXT."""

import os
import subprocess
import sys
import tempfile
import unittest

import torch
import transformers
from families import FAMILIES, HIDDEN, random_model
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

EXPAR, TEXT = sys.argv[1:3]
LAYER, TOKENS = 1, 50


def written_model(family, dtype, directory):
    """The model, in f32, whose checkpoint of `dtype` now lies in `directory`."""
    model = random_model(family)
    model.to(dtype).save_pretrained(directory)
    return model.float()


def block_of(model):
    layer = model.model.layers[LAYER]
    return getattr(layer, "mlp", None) or layer.feed_forward


def trained_block(directory):
    """The block with the weights that expar train has saved, in f32; transformers 5 keeps experts fused in memory."""
    config = transformers.Qwen3MoeConfig.from_pretrained(directory)
    tensors = load_file(os.path.join(directory, "model.safetensors"))
    prefix = f"model.layers.{LAYER}.mlp."

    def experts(name):
        return [tensors[f"{prefix}experts.{e}.{name}.weight"] for e in range(config.num_experts)]

    gate_up = [torch.cat(pair) for pair in zip(experts("gate_proj"), experts("up_proj"))]
    state = {
        "gate.weight": tensors[prefix + "gate.weight"],
        "experts.gate_up_proj": torch.stack(gate_up),
        "experts.down_proj": torch.stack(experts("down_proj")),
    }
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config)
    block.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return block.eval()


class Transformers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = lambda name: os.path.join(directory.name, name)

    def compare(self, model, block, width):
        torch.manual_seed(3)
        hidden = torch.randn(TOKENS, width)
        save_file({"hidden_states": hidden}, self.path("x"))
        subprocess.run([EXPAR, "run", "--model", model, "--layer", str(LAYER), "--input", self.path("x"),
                        "--output", self.path("y"), "--ranks", "2"], check=True, stdout=subprocess.DEVNULL)
        with torch.no_grad():
            theirs = block(hidden[None])
        theirs = (theirs[0] if isinstance(theirs, tuple) else theirs).reshape(TOKENS, width)
        # Sums of some tens of products in f32, in another order.
        torch.testing.assert_close(load_file(self.path("y"))["hidden_states"], theirs, rtol=1e-4, atol=1e-5)

    def test_computes_what_expar_run_computes_for_every_family(self):
        for family in FAMILIES:
            for dtype in (torch.float32, torch.bfloat16):
                with self.subTest(family=family, dtype=dtype):
                    path = self.path(f"{family}_{dtype}")
                    self.compare(path, block_of(written_model(family, dtype, path)), HIDDEN)

    def test_computes_what_expar_run_computes_after_a_training(self):
        with open(TEXT, "rb") as source, open(self.path("text"), "wb") as target:
            target.write(source.read(78000))
        sizes = dict(experts=5, topk=2, hidden=16, inner=24, context=4, batch=40, steps=20, ranks=3)
        flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        for dtype in ("f32", "bf16"):
            with self.subTest(dtype=dtype):
                path = self.path(dtype)
                subprocess.run([EXPAR, "train", "--text", self.path("text"), "--save", path, "--dtype", dtype, *flags],
                               check=True, stdout=subprocess.DEVNULL)
                self.compare(path, trained_block(path), 16)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
