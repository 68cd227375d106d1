"""transformers' Trainer with experts spread over its ranks: the run of one process, to be resumed anywhere."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import transformers
from processes import on_processes
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils import logging

sys.path.append(os.path.join(os.path.dirname(__file__), "../../tests/python"))

from families import VOCABULARY, random_model

import expar
import expar.torch as ep
import expar.transformers as et

BATCH, LENGTH, STEPS = 8, 7, 4
# Sums over a batch in another order, and what one step's rounding does to the next.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}

logging.set_verbosity_error()
logging.disable_progress_bar()


def rows(count, seed):
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(kind, folder, where=None, **changes):
    """Of ``kind`` "eager": all of it transformers', else expert-parallel."""
    options = dict(
        output_dir=folder,
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        optim="sgd",  # which a wrong size of gradients misleads
        learning_rate=0.05,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=3,
    )
    settings = TrainingArguments(**{**options, **changes})
    settings.per_device_train_batch_size //= settings.world_size * settings.gradient_accumulation_steps
    model = random_model("Qwen3Moe")
    if kind != "eager":
        et.enable(model, where)
    made = (transformers.Trainer if kind == "eager" else et.Trainer)(
        model=model, args=settings, train_dataset=rows(40, 1), eval_dataset=rows(BATCH, 2)
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def logged(made):
    kept = ("loss", "grad_norm", "eval_loss")
    return [{name: entry[name] for name in kept if name in entry} for entry in made.state.log_history]


def run(kind, folder, resume=None, **changes):
    """What it logged, all its parameters after training, and the names of experts."""
    made = trainer(kind, f"{folder}/{kind}", **changes)
    made.train(resume_from_checkpoint=resume)
    made.save_model(f"{folder}/{kind}/end")
    return logged(made), {name: p.detach() for name, p in made.model.named_parameters()}, experts_of(made.model)


def experts_of(model):
    return {name for name, _, _ in ep.expert_parameters(model)}


WAYS = {
    "clipped": {"max_grad_norm": 1.0},
    "not_clipped": {"max_grad_norm": 0.0, "learning_rate": 0.02},
    "accumulated": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2},
}


def all_ways(kind, folder):
    return {way: run(kind, f"{folder}/{way}", **changes) for way, changes in WAYS.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (one,) = on_processes(1, all_ways, "eager", folder)
    return one, on_processes(2, all_ways, "spread", folder)


@pytest.mark.parametrize("way", WAYS)
def test_losses_norms_and_parameters_are_those_of_one_process(runs, way):
    (log, parameters, _), ranks = runs[0][way], [rank[way] for rank in runs[1]]
    first = log[0]["grad_norm"]
    assert first > 1.2 and len(log) >= STEPS  # clipping by 1.0 does something
    for found, _, _ in ranks:
        assert len(found) == len(log)
        for got, want in zip(found, log):
            assert got.keys() == want.keys()
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, msg=lambda text: f"{name}: {text}", **CLOSE)
    for name, want in parameters.items():
        parts = [own[name] for _, own, _ in ranks]
        if name in ranks[0][2]:
            parts = [torch.cat(parts)]
        else:
            assert torch.equal(*parts), name
        torch.testing.assert_close(parts[0], want, msg=lambda text: f"{name}: {text}", **CLOSE)


ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}


def resumed(folder):
    """From the middle of a run with moments; then the model goes back to that."""
    log, parameters, _ = run("spread", folder, **ADAMW)
    made = trainer("spread", f"{folder}/again", **ADAMW)
    held = dict(made.model.named_parameters())
    middle = f"{folder}/spread/checkpoint-2"
    made.train(resume_from_checkpoint=middle)
    assert logged(made) == log
    for name, parameter in made.model.named_parameters():
        assert parameter is held[name] and torch.equal(parameter, parameters[name]), name

    made.state.best_model_checkpoint = middle
    made._load_best_model()
    for name, parameter in et.from_pretrained(AutoModelForCausalLM, middle).named_parameters():
        assert torch.equal(held[name], parameter) and not torch.equal(parameter, parameters[name]), name
    return log


def in_rows(folder):
    """Two sets of all experts, each on two ranks, in any order; saves, loads and goes on."""
    mesh = DeviceMesh("cpu", [[3, 1], [2, 0]], mesh_dim_names=("dp", "ep"))
    log, _, _ = run("spread", folder, where=mesh, **ADAMW)
    torch.distributed.barrier()  # all have what rank 0 has written
    again, _, _ = run("again", folder, f"{folder}/spread/checkpoint-2", where=mesh, **ADAMW)
    assert again == log
    return log


def test_replicas_of_experts_train_as_one_process(runs, tmp_path):
    wanted = runs[0]["adamw"][0]
    for found in on_processes(4, in_rows, tmp_path):
        for got, want in zip(found, wanted, strict=True):
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, **CLOSE)


def elsewhere(kind, folder):
    return run(kind, f"{folder}/elsewhere", f"{folder}/spread/checkpoint-2", **ADAMW)[0]


def test_training_goes_on_from_a_checkpoint_on_any_number_of_ranks(tmp_path):
    """To the same bytes where it is the same number."""
    log, *_ = on_processes(2, resumed, tmp_path)
    for found in (*on_processes(4, elsewhere, "spread", tmp_path), *on_processes(1, elsewhere, "spread", tmp_path)):
        for got, want in zip(found, log, strict=True):
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, **CLOSE)
    # The optimizer's state is that of one process: for each parameter, of its shape.
    state = torch.load(tmp_path / "spread/checkpoint-2/optimizer.pt")["state"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "spread/checkpoint-2")
    shapes = sorted(tuple(parameter.shape) for parameter in model.parameters())
    assert sorted(tuple(moments["exp_avg"].shape) for moments in state.values()) == shapes


def in_bf16(kind, folder):
    return run(kind, folder, bf16=True)[0]


def test_autocast_to_bf16_follows_that_of_one_process(runs, tmp_path):
    (one,) = on_processes(1, in_bf16, "eager", tmp_path)
    for log in on_processes(2, in_bf16, "spread", tmp_path):
        for got, want, exact in zip(log, one, runs[0]["clipped"][0]):
            for name, value in want.items():
                # Numbers of 8 bits. Losses are means of many; gradients are rounded again in every layer, and only
                # transformers rounds each expert's share of a token.
                torch.testing.assert_close(got[name], value, rtol=2**-8 if "loss" in name else 2**-4, atol=0)
                assert got[name] != exact[name]


def odd_uses(folder):
    model = et.enable(random_model("Mixtral"))
    plain = transformers.Trainer(
        model=model, args=TrainingArguments(folder, use_cpu=True, report_to="none"), train_dataset=rows(8, 1)
    )
    with pytest.raises(expar.BadArgument, match="would make them alike: use expar.transformers.Trainer"):
        plain.train()
    with pytest.raises(expar.Unsupported, match="leave even_batches on in accelerator_config"):
        trainer("spread", folder, accelerator_config={"even_batches": False}).train()
    # Two batches for one rank, one for the other.
    made = trainer("spread", folder, per_device_eval_batch_size=2)
    metrics = [made.evaluate(rows(count, 5))["eval_loss"] for count in (8, 5, 1)]
    return metrics


def test_what_would_go_wrong_is_refused_and_uneven_evaluation_ends(tmp_path):
    first, second = on_processes(2, odd_uses, tmp_path)
    assert first == second


def saved_under_a_file(folder):
    made = trainer("spread", folder)
    with pytest.raises(expar.IoError, match="Not a directory"):
        made.save_model(f"{folder}/file/model")
    made.save_model(f"{folder}/model")  # every rank goes on


def test_every_rank_hears_of_a_folder_that_rank_0_cannot_make(tmp_path):
    (tmp_path / "file").touch()
    on_processes(2, saved_under_a_file, tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
