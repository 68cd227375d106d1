"""Ranks as threads, for the tests beside this file."""

from __future__ import annotations

import expar


def on_ranks(ranks, body, **options):
    """What body(context) returns on each of ``ranks`` threads."""
    results = [None] * ranks
    expar.run_threads(ranks, lambda c: results.__setitem__(c.rank, body(expar.Context(c, threads=1))), **options)
    return results


def part(array, rank, ranks):
    """The rows of a rank, where neighbours share an array evenly."""
    begin, end = (len(array) * r // ranks for r in (rank, rank + 1))
    return array[begin:end].copy()
