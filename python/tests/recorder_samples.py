"""Loads and routes for the tests of the recorder and of the files that it reads and writes."""

from __future__ import annotations

import numpy as np

from expar.recorder import Recorder, Routes

LAYERS, EXPERTS = 3, 8


def some_loads(steps, seed=0):
    return np.random.default_rng(seed).integers(0, 100, (steps, LAYERS, EXPERTS))


def recorder_of(loads, steps=None, window=None):
    recorder = Recorder(LAYERS, EXPERTS, window=window)
    for step, of_step in zip(steps or range(len(loads)), loads):
        for layer, load in enumerate(of_step):
            recorder.record(step, layer, load)
    return recorder


def some_routes(layers=2, tokens=50, topk=3, experts=8, seed=0):
    random = np.random.default_rng(seed)
    ids = np.argsort(random.random((layers, tokens, experts)), axis=-1)[..., :topk].astype(np.int32)
    weights = (random.integers(0, 10001, ids.shape) / 10000).astype(np.float32)
    return Routes(ids=ids, experts=experts, weights=weights, header={"model": "of this test", "seq_lens": [20, 30]})


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.all(a == b))
