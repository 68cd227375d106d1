"""How even loads are: the last axis is experts or ranks, the others stay; where nothing was routed it is NaN."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _ratio(over: NDArray, under: NDArray) -> NDArray:
    return np.divide(over, under, out=np.full(np.shape(under), np.nan), where=np.asarray(under) != 0)


def max_over_mean(loads: ArrayLike) -> NDArray[np.float64]:
    """The most loaded against the mean: 1 is even, E is all on one.

    loads   : [..., E]
    returns : [...] f64
    """
    loads = np.asarray(loads, dtype=np.float64)
    return _ratio(loads.max(axis=-1), loads.mean(axis=-1))


def mean_over_max(loads: ArrayLike) -> NDArray[np.float64]:
    """The inverse of max_over_mean, which SGLang calls the utilisation rate: 1 is even, 1 / E is all on one.

    loads   : [..., E]
    returns : [...] f64
    """
    loads = np.asarray(loads, dtype=np.float64)
    return _ratio(loads.mean(axis=-1), loads.max(axis=-1))


def balancedness(loads: ArrayLike) -> float:
    """vLLM's number for all layers together: the sum of their means over the sum of their maxima.

    loads : [..., layers, P], of the ranks: see rank_loads

    Source: vllm/distributed/eplb/eplb_state.py at 0014ec6, which says 0 where nothing was routed.
    """
    loads = np.asarray(loads, dtype=np.float64)
    return float(_ratio(loads.mean(axis=-1).sum(), loads.max(axis=-1).sum()))


def gini(loads: ArrayLike) -> NDArray[np.float64]:
    """Gini's coefficient, the mean difference of two loads over twice their mean: 0 is even, (E - 1) / E all on one.

    loads   : [..., E]
    returns : [...] f64
    """
    ordered = np.sort(np.asarray(loads, dtype=np.float64), axis=-1)
    count = ordered.shape[-1]
    # The i-th smallest of E is larger in i - 1 pairs and smaller in E - i.
    lead = 2.0 * np.arange(1, count + 1) - count - 1
    return _ratio((lead * ordered).sum(axis=-1), count * ordered.sum(axis=-1))


def rank_loads(loads: ArrayLike, ranks: int) -> NDArray[np.int64]:
    """The loads of ranks that hold the experts in order, rank r those from floor(r E / P) to floor((r + 1) E / P) - 1.

    loads   : [..., E]
    returns : [..., P] int64
    Raises ValueError: no ranks.
    """
    loads = np.asarray(loads)
    if ranks < 1:
        raise ValueError(f"ranks = {ranks}, should be at least 1")
    bounds = np.arange(ranks + 1) * loads.shape[-1] // ranks
    # Of differences of sums, since a rank may hold no expert at all.
    sums = np.zeros((*loads.shape[:-1], loads.shape[-1] + 1), dtype=np.int64)
    np.cumsum(loads, axis=-1, out=sums[..., 1:])
    return np.diff(sums[..., bounds], axis=-1)
