"""Fine-tunes a Mixture-of-Experts model of Hugging Face on the bytes of a text, its experts spread over the ranks.

    program="examples/python/finetune_transformers.py --text data/kjv.txt"
    torchrun --standalone --nproc-per-node 2 $program --output runs/bible
    torchrun --standalone --nproc-per-node 4 $program --output runs/bible --steps 200 --resume
    python $program --output runs/eager --eager

Without ``--model`` it is a small Qwen3-MoE with random weights. ``--eager`` trains the same in one process, all of it
transformers' own: the same losses but for rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainingArguments

import expar.transformers

BATCH, LENGTH = 16, 64  # sequences of a step on all ranks, bytes of each


class Bytes(Dataset):
    """A text as sequences of bytes, each of which is to be guessed from those before it."""

    def __init__(self, text: bytes) -> None:
        whole = len(text) // LENGTH * LENGTH
        self._rows = torch.frombuffer(bytearray(text[:whole]), dtype=torch.uint8).view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self._rows[index].long()
        return {"input_ids": row, "labels": row}


def random_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
            norm_topk_prob=True,
            max_position_embeddings=LENGTH,
        )
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="where checkpoints go")
    parser.add_argument("--model", help="a directory or a name on the hub")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, parameters stay in float32")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--losses", type=pathlib.Path, help="where rank 0 writes what each step has logged, as JSON")
    return parser.parse_args()


def finetune(args: argparse.Namespace) -> None:
    settings = TrainingArguments(
        output_dir=str(args.output),
        use_cpu=True,
        max_steps=args.steps,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        bf16=args.bf16,
        save_steps=args.save_steps,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )

    if args.eager:
        model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else random_model()
    elif args.model:
        model = expar.transformers.from_pretrained(AutoModelForCausalLM, args.model)
    else:
        model = expar.transformers.enable(random_model())
    trainer_class = transformers.Trainer if args.eager else expar.transformers.Trainer
    trainer = trainer_class(model=model, args=settings, train_dataset=Bytes(args.text.read_bytes()))
    trainer.train(resume_from_checkpoint=args.resume)
    if args.losses and trainer.is_world_process_zero():
        args.losses.write_text(json.dumps([entry for entry in trainer.state.log_history if "loss" in entry]))


def main() -> None:
    finetune(arguments())
    if dist.is_initialized():
        dist.destroy_process_group()  # after the model: DDP holds on to the group


if __name__ == "__main__":
    main()
