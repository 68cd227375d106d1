"""transformers' own MoE block on what expar train --save has written, beside expar run: transformers_test.py EXPAR TEXT."""

import os
import subprocess
import sys
import tempfile
import unittest

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

EXPAR, TEXT = sys.argv[1:3]
EXPERTS, TOPK, HIDDEN, TOKENS, LAYER = 5, 2, 16, 50, 1


def block_of(directory):
    """The block with the checkpoint's weights, in f32; transformers 5 keeps experts fused in memory."""
    block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig.from_pretrained(directory))
    tensors = load_file(os.path.join(directory, "model.safetensors"))
    prefix = f"model.layers.{LAYER}.mlp."

    def experts(name):
        return [tensors[f"{prefix}experts.{e}.{name}.weight"] for e in range(EXPERTS)]

    gate_up = [torch.cat(pair) for pair in zip(experts("gate_proj"), experts("up_proj"))]
    state = {
        "gate.weight": tensors[prefix + "gate.weight"],
        "experts.gate_up_proj": torch.stack(gate_up),
        "experts.down_proj": torch.stack(experts("down_proj")),
    }
    block.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return block.eval()


class Transformers(unittest.TestCase):
    def compare(self, dtype):
        with tempfile.TemporaryDirectory() as directory:
            text, model, x, y = (os.path.join(directory, name) for name in ("text", "model", "x", "y"))
            with open(TEXT, "rb") as source, open(text, "wb") as target:
                target.write(source.read(78000))
            sizes = dict(experts=EXPERTS, topk=TOPK, hidden=HIDDEN, inner=24, context=4, batch=40, steps=20, ranks=3)
            flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
            subprocess.run([EXPAR, "train", "--text", text, "--save", model, "--dtype", dtype, *flags],
                           check=True, stdout=subprocess.DEVNULL)
            torch.manual_seed(3)
            hidden = torch.randn(TOKENS, HIDDEN)
            save_file({"hidden_states": hidden}, x)
            subprocess.run([EXPAR, "run", "--model", model, "--layer", str(LAYER), "--input", x, "--output", y,
                            "--ranks", "2"], check=True, stdout=subprocess.DEVNULL)
            ours = load_file(y)
            block = block_of(model)
            with torch.no_grad():
                theirs = block(hidden[None])
                logits = torch.nn.functional.linear(hidden, block.gate.weight)
            theirs = (theirs[0] if isinstance(theirs, tuple) else theirs).reshape(TOKENS, HIDDEN)
            ids = torch.topk(logits, TOPK).indices
            self.assertTrue(torch.equal(ours["topk_ids"].long(), ids))
            # Sums of 16 and 24 products in f32, in another order.
            torch.testing.assert_close(ours["hidden_states"], theirs, rtol=1e-5, atol=1e-6)

    def test_computes_what_expar_run_computes_from_f32(self):
        self.compare("f32")

    def test_computes_what_expar_run_computes_from_bf16(self):
        self.compare("bf16")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
