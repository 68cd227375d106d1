"""Times one MoE layer beside other implementations of it: whole processes, the same cores, weights and tokens.

    python bench/compare_layers.py --notebook Practice03DistMoE.md --json layers.json
    python bench/compare_layers.py --tokens 1024 --hidden 2048 --inner 768 --experts 128 --topk 8 --dtype bf16

Two cores each: one process with two threads, or two ranks with one. All peers live at once and take turns, in another
order each round, the others asleep. Everything counts: router, counts, communication, waiting. Every peer's output and
gradients are compared with those of a plain loop before and after; a row that is off is counted as wrong, and then this
exits with 1. Ratios are times over those of expar's layer in the same rounds: above 1 it is the faster one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from peers import deepspeed_layer, expar_layer, gloo_layer, notebook_layer, transformers_layer
from peers.peer import Peer
from peers.ranks import Failed, Ranks, Result
from peers.task import Gradients, Task, count_wrong, draw_tokens, draw_weights, expected

# One layer of Qwen3-30B-A3B, and the notebook's.
SIZES = {
    "qwen3": dict(tokens=[8, 1024], hidden=2048, inner=768, experts=128, topk=8, dtype="bf16"),
    "notebook": dict(
        tokens=[32],
        hidden=256,
        inner=1024,
        experts=16,
        topk=2,
        dtype="f32",
        activation="gelu",
        bias=True,
        renormalise=False,
        adamw=True,
    ),
}
WHATS = ("forward", "step")
TURN = 50e3  # microseconds that a turn takes at the least
SLOW = 30e6  # who takes longer is timed once, and not with more tokens
REST = 0.01  # seconds: threads of OpenMP look for work so long after they had some


@dataclasses.dataclass(frozen=True)
class Call:
    peer: str
    what: str


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), nargs="+", help="what the next six default to")
    parser.add_argument("--tokens", type=int, nargs="+", help="of each of the two ranks")
    for name in ("hidden", "inner", "experts", "topk"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", choices=["f32", "bf16"])
    parser.add_argument("--notebook", default="", help="a file with class EPMoE in a cell, .ipynb or .md; it is run")
    parser.add_argument("--peers", nargs="+", help="only these")
    parser.add_argument("--seconds", type=float, default=15.0, help="of rounds, for each size and number of tokens")
    parser.add_argument("--json", help="where the rows are written")
    args = parser.parse_args()
    given = [getattr(args, name) for name in ("tokens", "hidden", "inner", "experts", "topk", "dtype")]
    if args.size is None:
        args.size = list(SIZES) if given.count(None) == len(given) else ["qwen3"]
    return args


def tasks_of(size: str, args: argparse.Namespace) -> list[Task]:
    fields = dict(SIZES[size])
    for name in fields:
        if getattr(args, name, None) is not None:
            fields[name] = getattr(args, name)
    return [Task(**{**fields, "tokens": tokens}) for tokens in fields["tokens"]]


def machine() -> dict[str, Any]:
    with open("/proc/cpuinfo") as file:
        fields = dict(tuple(part.strip() for part in line.split(":", 1)) for line in file if ":" in line)
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1])
    features = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.machine()),
        "kernel": f"{platform.system()} {platform.release()}",
        "cores": int(fields.get("processor", "-1")) + 1,
        "memory_gib": round(memory / 2**20, 1),
        "features": [f for f in features if f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")],
        "torch": torch.__version__,
    }


class Comparison:
    """All peers of one set of weights."""

    def __init__(self, peers: list[Peer], task: Task) -> None:
        self.weights = draw_weights(task, seed=1)
        self.ranks: dict[str, Ranks] = {}
        self.absent: dict[str, str] = {}
        self.broken = False  # a peer that is there did not start
        self.slow: dict[Call, str] = {}
        for peer in peers:
            reason = peer.available(task)
            if not reason:
                try:
                    self.ranks[peer.name] = Ranks(peer, task, self.weights)
                    continue
                except Failed as failed:
                    self.broken = True
                    reason = str(failed).strip().splitlines()[-1]
                    print(failed, file=sys.stderr)
            self.absent[peer.name] = reason

    def rows(self, task: Task, seconds: float) -> list[dict[str, Any]]:
        x, dout = draw_tokens(task, self.weights, seed=2)
        for ranks in self.ranks.values():
            ranks.give(x, dout)
        wanted = expected(task, self.weights, x, dout)
        calls = [call for name in self.ranks for what in WHATS if (call := Call(name, what)) not in self.slow]
        first = {call: self.ranks[call.peer].results(call.what) for call in calls}
        wrong = {call: count_wrong_rows(call, task, results, wanted) for call, results in first.items()}
        times = {c: [(max(r.seconds for r in rs) * 1e6, sum(r.cpu for r in rs) * 1e6)] for c, rs in first.items()}
        for call, ((us, _),) in times.items():
            if us > SLOW:
                self.slow[call] = f"took {us * 1e-6:.0f} s for {task.tokens} tokens, and was not run again"
        again = [call for call in calls if call not in self.slow]
        times.update(self._times({call: times[call][0][0] for call in again}, seconds))
        for call in again:
            wrong[call] += count_wrong_rows(call, task, self.ranks[call.peer].results(call.what), wanted)
        return [
            self._row(task, Call(ours.name, what), ours.ranks, times, wrong)
            for what in WHATS
            for ours in (expar_layer.ONE_RANK, expar_layer.ALL_RANKS)
            if ours.name in self.ranks
        ]

    def end(self) -> None:
        for ranks in self.ranks.values():
            ranks.end()

    def _times(self, cold: dict[Call, float], seconds: float) -> dict[Call, list[tuple[float, float]]]:
        """Microseconds, one pair for each round: passed, and of CPU time."""
        calls = {call: round(TURN / us) + 1 for call, us in cold.items()}
        times: dict[Call, list[tuple[float, float]]] = {call: [] for call in calls}
        order, shuffled = list(times), random.Random(3)
        end, rounds = time.monotonic() + seconds, 0
        while rounds < 3 or time.monotonic() < end:
            shuffled.shuffle(order)
            for call in order:
                time.sleep(REST)
                times[call].append(self.ranks[call.peer].turn(call.what, calls[call]))
            rounds += 1
        return times

    def _row(self, task: Task, mine: Call, ranks: int, times, wrong) -> dict[str, Any]:
        p50 = {call: statistics.median(us for us, _ in pairs) for call, pairs in times.items()}
        cpu = {call: statistics.median(us for _, us in pairs) for call, pairs in times.items()}
        row = {"what": f"layer_{mine.what}", "ranks": ranks, **dataclasses.asdict(task)}
        row.update(tokens=task.total // ranks, p50_us=p50[mine], cpu_us=cpu[mine])
        row.update(rounds=len(times[mine]), wrong=wrong[mine], peers={})
        for call, us in p50.items():
            if call.what == mine.what and call.peer != mine.peer:
                row["peers"][call.peer] = {
                    "p50_us": us,
                    "ratio": us / p50[mine],
                    "cpu_us": cpu[call],
                    "cpu_ratio": cpu[call] / cpu[mine],
                    "rounds": len(times[call]),
                    "wrong": wrong[call],
                }
        return row


def count_wrong_rows(call: Call, task: Task, results: list[Result], wanted: tuple[Tensor, Gradients]) -> int:
    """In what the ranks have got, all of it together."""
    rights = {"out": wanted[0], **vars(wanted[1])}
    counts = {}
    for name in results[0].parts:
        parts = [r.parts[name] for r in results]
        # Each rank has its part of the router's gradient, and all of it of its own tokens and experts.
        got = torch.stack(parts).sum(0) if name == "router" else torch.cat(parts)
        counts[name] = count_wrong(task, got, rights[name])
    if any(counts.values()):
        print(f"{call.peer} gets wrong, in rows: {counts}", file=sys.stderr)
    return sum(counts.values())


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        shape = "T {tokens} H {hidden} F {inner} E {experts} K {topk} {dtype}".format(**row)
        print(f"{row['what']}, {row['ranks']} ranks, {shape}: {row['p50_us']:.0f} us, wrong {row['wrong']}")
        for name, peer in row["peers"].items():
            ratios = f"ratio {peer['ratio']:7.2f}   of CPU time {peer['cpu_ratio']:7.2f}"
            print(f"    {name:24} {peer['p50_us']:12.0f} us   {ratios}   wrong {peer['wrong']}")


def main() -> int:
    args = arguments()
    peers = [
        expar_layer.ONE_RANK,
        expar_layer.ALL_RANKS,
        transformers_layer.EAGER,
        transformers_layer.GROUPED_MM,
        gloo_layer.PEER,
        deepspeed_layer.PEER,
        notebook_layer.peer(args.notebook),
    ]
    peers = [peer for peer in peers if args.peers is None or peer.name in args.peers]
    broken = False
    report: dict[str, Any] = {"machine": machine(), "rows": [], "absent": {}}
    print("#", json.dumps(report["machine"]))
    for size in args.size:
        tasks = tasks_of(size, args)
        comparison = Comparison(peers, tasks[0])
        for task in tasks:
            rows = comparison.rows(task, args.seconds)
            show(rows)
            report["rows"] += rows
        absent = comparison.absent | {f"{c.peer}, {c.what}": reason for c, reason in comparison.slow.items()}
        for name, reason in absent.items():
            print(f"  {name}: {reason}")
        report["absent"][size] = absent
        comparison.end()
        broken |= comparison.broken
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
    return int(broken or any(row["wrong"] + sum(p["wrong"] for p in row["peers"].values()) for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
