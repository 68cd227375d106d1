"""expar.tutorial: the layer against loops in double precision, its buffers against its fast path, and its training."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from processes import on_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import expar
from expar.tutorial import EPMoE, MoEConfig, PyTorchAllToAll

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
EXPERTS, TOPK, HIDDEN, ROOM = 8, 2, 16, 16
TOKENS = (11, 16, 0, 5)  # of each rank
PARTS = ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias")
CAPACITIES = [{}, {"capacity_factor": 1.0}, {"capacity_per_expert": 3}]


def config(**settings):
    return MoEConfig(EXPERTS, TOPK, HIDDEN, ROOM, **{"in_dtype": torch.float32, "out_dtype": torch.float32, **settings})


def batch(rank):
    """Tokens that lean to a few experts, and the gradient of the output."""
    g = torch.Generator().manual_seed(rank)
    x, dout = torch.randn(2, TOKENS[rank], HIDDEN, generator=g)
    return x + 1, dout


def whole():
    """The notebook's state dict of one rank: the gate and all experts."""
    torch.manual_seed(3)
    return EPMoE(config(), 0, 1).state_dict()


def model(cfg):
    """The same over all ranks, its gate in DDP."""
    moe, drawn = EPMoE(cfg), whole()
    first = moe.rank * moe.num_local_experts
    mine = {name: value for name, value in drawn.items() if name.startswith("gate.")}
    for e in range(moe.num_local_experts):
        mine |= {f"experts.{e}.{part}": drawn[f"experts.{first + e}.{part}"] for part in PARTS}
    moe.load_state_dict(mine)
    moe.gate = DistributedDataParallel(moe.gate)
    return moe


def step(settings, body=lambda moe, x: moe(x)):
    """What a rank gets: output, auxiliary loss, and the gradients of x, gate and experts."""
    moe = model(config(**settings))
    x, dout = batch(moe.rank)
    x.requires_grad_()
    out, aux = body(moe, x)
    ((out.float() * dout).sum() + aux).backward()
    return [out.detach(), aux.detach(), x.grad, *(p.grad for p in moe.parameters())]


def token_by_token(x, parameters, capacity):
    """Output and auxiliary loss of a rank's tokens; and how many slots were dropped."""
    probs = (x @ parameters["gate.weight"].T + parameters["gate.bias"]).softmax(1)
    chosen, room, rows = torch.zeros_like(probs), [capacity] * EXPERTS, []
    for t, token in enumerate(x):
        row = torch.zeros_like(token) if capacity == math.inf else token
        for e in probs[t].topk(TOPK).indices.tolist():
            chosen[t, e] = 1
            room[e] -= 1
            if room[e] >= 0:
                up, up_bias, down, down_bias = (parameters[f"experts.{e}.{part}"] for part in PARTS)
                row = row + probs[t, e] * (nn.functional.gelu(up @ token + up_bias) @ down.T + down_bias)
        rows.append(row)
    if not rows:
        return 0 * x, 0 * x.sum(), 0
    aux = probs.sum(0).var() / EXPERTS**2 + EXPERTS * (chosen.mean(0) * (probs * chosen).mean(0)).sum()
    return torch.stack(rows), aux, -sum(min(r, 0) for r in room)


def expected(ranks, settings):
    """What step() should return on each rank, in double precision, and how many slots were dropped."""
    parameters = {name: value.double().requires_grad_() for name, value in whole().items()}
    xs, results, total, dropped = [], [], 0, 0
    for rank in range(ranks):
        x, dout = (t.double() for t in batch(rank))
        factor, most = settings.get("capacity_factor"), settings.get("capacity_per_expert", math.inf)
        capacity = most if factor is None else math.ceil(factor * len(x) * TOPK / EXPERTS)
        out, aux, missing = token_by_token(x.requires_grad_(), parameters, capacity)
        xs.append(x)
        results.append([out.detach(), aux.detach()])
        total, dropped = total + (out * dout).sum() + aux, dropped + missing
    total.backward()
    gate = [parameters[f"gate.{name}"].grad / ranks for name in ("weight", "bias")]
    local = EXPERTS // ranks
    for rank, (x, result) in enumerate(zip(xs, results)):
        mine = range(rank * local, (rank + 1) * local)
        result += [x.grad, *gate]
        result += [parameters[f"experts.{e}.{part}"].grad for e in mine for part in PARTS]
    return results, dropped


def assert_like(found, wanted, tolerance):
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted):
        if want is None:  # an expert that nobody chose
            assert got is None
            continue
        largest = max(want.abs().flatten().tolist(), default=0)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * max(1, largest))


@pytest.mark.parametrize("settings", CAPACITIES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_step_is_that_of_loops_in_double_precision(ranks, settings):
    wanted, dropped = expected(ranks, settings)
    assert (dropped > 0) == bool(settings)
    for found, want in zip(on_processes(ranks, step, settings), wanted):
        # Sums of at most 4 HIDDEN products in f32, four deep.
        assert_like(found, want, 4 * 4 * HIDDEN * 2**-24)


def buffered(moe, x):
    """The notebook's own way from gate to output: through padded buffers, expert by expert."""
    cfg = moe.cfg
    probs = moe.gate(x).softmax(-1)
    weights, indices = probs.topk(TOPK)
    counts, rows, meta = moe.ata.dispatch(x, indices)
    results = []
    for expert, count, r in zip(moe.experts, counts, rows.float()):
        results.append(expert(r) if count > 0 else 0 * r)
    out = torch.zeros(cfg.max_num_tokens, HIDDEN, dtype=cfg.out_dtype)
    if cfg.capacity(len(x)) is not None:
        out[: len(x)] += x
    out = moe.ata.combine(out, weights, meta, torch.stack(results).to(cfg.out_dtype), counts)
    return out[: len(x)], moe._aux_loss(probs, indices)


@pytest.mark.parametrize("settings", CAPACITIES, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_dispatch_and_combine_with_experts_between_are_the_layer(ranks, settings):
    for found, want in zip(on_processes(ranks, step, settings, buffered), expected(ranks, settings)[0]):
        assert_like(found, want, 4 * 4 * HIDDEN * 2**-24)


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("body", [None, buffered])
def test_what_travels_in_a_short_dtype_is_rounded_and_no_more(dtype, bits, body):
    short = {"in_dtype": dtype, "out_dtype": dtype}
    arguments = (short,) if body is None else (short, body)
    for found, want in zip(on_processes(2, step, *arguments), expected(2, {})[0]):
        assert found[0].dtype == dtype
        assert_like(found, want, 4 * 2.0**-bits)


def metadata():
    ata = PyTorchAllToAll(config())
    x, _ = batch(ata.rank)
    indices = torch.stack([torch.arange(len(x)) % 5, torch.arange(len(x)) % 3 + 5], 1)
    counts, rows, meta = ata.dispatch(x, indices)
    assert (counts.dtype, meta.dtype) == (torch.int32, torch.int32)
    assert rows.shape == (EXPERTS // ata.world_size, ROOM * ata.world_size, HIDDEN)
    assert meta.shape == (*rows.shape[:2], 5)
    return counts, rows, meta


def test_metadata_says_of_each_row_where_it_comes_from():
    wanted = [[] for _ in range(EXPERTS)]
    for rank in range(4):
        for t in range(TOKENS[rank]):
            for k, e in enumerate((t % 5, t % 3 + 5)):
                wanted[e].append([e, rank, t, k, 0])
    results = on_processes(4, metadata)
    assert sum((counts.tolist() for counts, _, _ in results), []) == [len(lines) for lines in wanted]
    tokens = [batch(rank)[0] for rank in range(4)]
    for e, lines in enumerate(wanted):
        _, rows, meta = results[e // 2]
        assert meta[e % 2, : len(lines)].tolist() == lines
        assert rows[e % 2, : len(lines)].equal(torch.stack([tokens[rank][t] for _, rank, t, _, _ in lines]))
        assert not meta[e % 2, len(lines) :].any() and not rows[e % 2, len(lines) :].any()


def one_expert():
    """Tokens of both ranks go to one expert, of rank 0; rank 1 computes nothing."""
    moe = model(config())
    x, dout = batch(moe.rank)
    x.requires_grad_()
    counts, rows, meta = moe.ata.dispatch(x, torch.zeros(len(x), 1, dtype=torch.int64))
    y = torch.zeros_like(rows)
    if counts[0] > 0:
        y[0, : counts[0]] = 3 * rows[0, : counts[0]]
    else:
        y = y + 0 * rows
    weights = torch.full((len(x), 1), 0.5, requires_grad=True)
    out = moe.ata.combine(torch.zeros_like(x), weights, meta, y, counts)
    (out * dout).sum().backward()
    assert out.equal(1.5 * x) and x.grad.equal(1.5 * dout)
    torch.testing.assert_close(weights.grad, (3 * x * dout).sum(1, keepdim=True))


def test_a_rank_without_rows_goes_backward_with_the_others():
    on_processes(2, one_expert)


def one_wants_dx():
    moe = EPMoE(config())
    x = torch.ones(4, HIDDEN, requires_grad=moe.rank == 0)
    with pytest.raises(expar.Mismatch):
        moe(x)[0].sum().backward()


def test_a_gradient_of_x_that_only_one_rank_asks_for_is_refused():
    on_processes(2, one_wants_dx)


def same_bytes():
    moe = model(config())
    x, dout = torch.randn(2, 8, HIDDEN, generator=torch.Generator().manual_seed(1))
    mine = slice(*(8 * r // moe.world_size for r in (moe.rank, moe.rank + 1)))
    out, _ = moe(x[mine])
    (out * dout[mine]).sum().backward()
    return out.detach(), *(torch.stack([p.grad for p in kind]) for kind in moe.experts._by_kind())


def test_bytes_are_the_same_on_any_number_of_ranks():
    one, two, four = ([torch.cat(parts) for parts in zip(*on_processes(ranks, same_bytes))] for ranks in (1, 2, 4))
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(one, two, four))


def test_state_dicts_are_the_notebooks():
    names = set(whole())
    assert names == {"gate.weight", "gate.bias"} | {f"experts.{e}.{part}" for e in range(EXPERTS) for part in PARTS}
    moe = EPMoE(config(), 0, 1)
    moe.load_state_dict(whole())
    assert all(a.equal(b) for a, b in zip(moe.state_dict().values(), whole().values()))
    with pytest.raises(RuntimeError, match="experts.3.net.2.bias"):
        moe.load_state_dict({name: value for name, value in whole().items() if name != "experts.3.net.2.bias"})


def test_experts_are_drawn_in_the_order_of_their_names_after_the_gate():
    torch.manual_seed(5)
    gate, up = nn.Linear(HIDDEN, EXPERTS), nn.Linear(HIDDEN, 4 * HIDDEN)
    torch.manual_seed(5)
    drawn = EPMoE(config(), 0, 1).state_dict()
    assert drawn["gate.weight"].equal(gate.weight) and drawn["experts.0.net.0.bias"].equal(up.bias)


def test_experts_may_lie_anywhere():
    moe, scattered = EPMoE(config(), 0, 1), EPMoE(config(), 0, 1)
    moe.load_state_dict(whole())
    scattered.load_state_dict(whole(), assign=True)
    results = []
    for each in (moe, scattered):
        out, _ = each(batch(0)[0])
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    first, second = (each.net[0].weight for each in list(moe.experts)[:2])
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_eval_mode_has_no_auxiliary_loss():
    moe = EPMoE(config(), 0, 1).eval()
    assert moe(batch(0)[0])[1] == 0


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"bounded by \[1.0, 4\]"):
        config(capacity_factor=1.0, capacity_per_expert=4)
    with pytest.raises(ValueError, match=r"bounded by \[0\]"):
        config(capacity_per_expert=0)
    with pytest.raises(ValueError, match="world_size is 2, but this is rank 0 of 1"):
        EPMoE(config(), 0, 2)
    with pytest.raises(ValueError, match="rank is 1, but"):
        EPMoE(config(), 1, 1)
    ata = PyTorchAllToAll(config(), 0, 1)
    with pytest.raises(expar.BadArgument, match="17 tokens, max_num_tokens is 16"):
        ata.dispatch(torch.zeros(17, HIDDEN), torch.zeros(17, TOPK, dtype=torch.int64))
    with pytest.raises(expar.BadArgument, match=r"indices \[9\]; should be \[T, H\] and \[T, K\]"):
        ata.dispatch(torch.zeros(9, HIDDEN), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(expar.BadArgument, match="got 18 rows, room is for 16: some"):
        ata.dispatch(torch.zeros(9, HIDDEN), torch.zeros(9, TOPK, dtype=torch.int64))


SMALL = ("--hidden-dim", 64, "--lr", 5e-3)
LINE = re.compile(r"\[step (\d{5})\] task=(\d\.\d{4}) aux=(\d\.\d{4}) total=(\d\.\d{4}) interval_s=\d+\.\d{2}")


def trained(ranks, folder, *arguments, timeout=200):
    """(step, task, aux, total) of each line that the example prints."""
    program = [f"{ROOT}/examples/python/tiny_ep.py", *map(str, arguments)]
    torchrun = [os.path.join(os.path.dirname(sys.executable), "torchrun"), "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *program] if ranks == 1 else [*torchrun, *program]
    environment = {**os.environ, "TB_LOGDIR": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, total, last = done.stdout.splitlines()
    assert re.fullmatch(r"\[ep\] total \d+ steps time: \d+\.\d\ds \| \d+\.\d\d ms/step", total)
    assert last == "EP MoE tiny training finished."
    return [tuple(map(float, LINE.fullmatch(line).groups())) for line in lines]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_learns_and_tells_tensorboard(tmp_path, ranks):
    lines = trained(ranks, tmp_path, "--steps", 61, "--log-interval", 20, "--profile", "--seed", 1, *SMALL)
    assert [line[0] for line in lines] == [0, 20, 40, 60]
    assert all(abs(task + 0.01 * aux - total) < 2e-4 for _, task, aux, total in lines)
    assert lines[0][1] > 0.3 > lines[-1][1]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss/task", "loss/aux", "loss/total", "time/interval_s"}
    assert [e.step for e in events.Scalars("loss/aux")] == list(range(61))
    assert [e.step for e in events.Scalars("time/interval_s")] == [0, 20, 40, 60]
    task = events.Scalars("loss/task")
    assert all(abs(task[int(step)].value - value) < 1e-4 for step, value, _, _ in lines)
